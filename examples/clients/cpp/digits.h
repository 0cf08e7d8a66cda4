// The task: UCI digits and a perceptron with ReLU between its layers and softmax cross-entropy, summed over samples.
//
// Another task is another class with these four methods; nothing else here knows digits.
#pragma once

#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "wire.h"

namespace armillary {

// The task or its data cannot be loaded; says what to do.
struct TaskError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// What a gradient or an evaluation gives besides: sums over samples, in float64.
struct Sums {
    double loss = 0;
    std::int64_t count = 0;
    std::map<std::string, double> metrics;

    // left + right; a metric that only one side has passes unchanged.
    void add(const Sums& right);
};

class Digits {
public:
    // Throws TaskError where options, layout or data are not those of `digits`.
    Digits(const std::map<std::string, std::string>& options, const pb::Manifest& manifest, const std::string& file);

    std::int64_t train_size() const { return static_cast<std::int64_t>(train_.labels.size()); }
    std::int64_t test_size() const { return static_cast<std::int64_t>(test_.labels.size()); }

    // Writes the sum of the samples' gradients over every tensor of `out`, a flat buffer as `weights` is.
    Sums gradient(const float* weights, const std::vector<std::int64_t>& samples, float* out) const;
    Sums evaluate(const float* weights, const std::vector<std::int64_t>& samples) const;

private:
    struct Split {
        std::vector<std::uint8_t> images, labels;
    };
    struct Layer {
        std::size_t inputs, outputs;
        std::int64_t weight, bias;  // offsets in the flat buffer
    };
    using Matrix = std::vector<float>;  // row by row, a row per sample

    void load(const std::string& file);
    // The activations of every layer, inputs first; the last are exp(logits - their maximum) of the forward pass.
    Sums forward(const Split& split, const float* weights, const std::vector<std::int64_t>& samples,
                 std::vector<Matrix>& activations) const;

    std::vector<Layer> layers_;
    Split train_, test_;
};

}  // namespace armillary
