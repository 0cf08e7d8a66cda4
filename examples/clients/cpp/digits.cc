// Products are summed in float64 and rounded once: within 1e-5 of a BLAS that sums in float32, in any order.
#include "digits.h"

#include <zlib.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <memory>

namespace armillary {

namespace {

constexpr std::size_t kPixels = 64, kClasses = 10, kSamples = 1797, kTrain = 1437;
constexpr float kScale = 1.0f / 16;    // a pixel counts the dark points of a 4x4 field
constexpr std::uint64_t kSplitSeed = 0;  // the split is part of the task

// "64", "256,128" or "(256, 128)"; none for an empty text.
std::vector<std::size_t> widths(std::string text) {
    const std::string given = text;
    text.erase(std::remove_if(text.begin(), text.end(), [](char c) { return std::string("()[] ").find(c) < 5; }),
               text.end());
    std::vector<std::size_t> found;
    for (std::size_t at = 0; at < text.size();) {
        const std::size_t end = std::min(text.find(',', at), text.size());
        if (end > at) {
            std::size_t width = 0;
            const auto [stop, error] = std::from_chars(text.data() + at, text.data() + end, width);
            if (error != std::errc() || stop != text.data() + end || width == 0)
                throw TaskError("task option hidden='" + given + "': give layer widths such as 64 or 256,128");
            found.push_back(width);
        }
        at = end + 1;
    }
    return found;
}

std::string unpacked(const std::string& file) {
    const std::unique_ptr<gzFile_s, int (*)(gzFile)> packed(gzopen(file.c_str(), "rb"), gzclose);
    if (!packed) throw TaskError(file + " cannot be opened; name the file with --data");
    std::string text;
    char buffer[1 << 16];
    int size;
    while ((size = gzread(packed.get(), buffer, sizeof buffer)) > 0) text.append(buffer, static_cast<std::size_t>(size));
    if (size < 0) throw TaskError(file + " cannot be unpacked; copy it again");
    return text;
}

}  // namespace

void Sums::add(const Sums& right) {
    loss += right.loss;
    count += right.count;
    for (const auto& [name, value] : right.metrics)
        if (const auto [place, is_new] = metrics.emplace(name, value); !is_new) place->second += value;
}

Digits::Digits(const std::map<std::string, std::string>& options, const pb::Manifest& manifest,
               const std::string& file) {
    std::string hidden = "64";
    for (const auto& [name, value] : options) {
        if (name != "hidden") throw TaskError("task option " + name + ": this worker's digits takes hidden only");
        hidden = value;
    }
    std::vector<std::size_t> sizes = widths(hidden);
    sizes.insert(sizes.begin(), kPixels);
    sizes.push_back(kClasses);
    const auto fits = [&manifest](std::size_t at, const std::string& name, const std::vector<std::size_t>& shape) {
        const pb::Tensor& tensor = manifest.tensors(static_cast<int>(at));
        return tensor.name() == name && tensor.dtype() == "float32" &&
               std::equal(shape.begin(), shape.end(), tensor.shape().begin(), tensor.shape().end(),
                          [](std::size_t a, std::int64_t b) { return static_cast<std::int64_t>(a) == b; });
    };
    bool same = static_cast<std::size_t>(manifest.tensors_size()) == 2 * (sizes.size() - 1);
    for (std::size_t n = 0; same && n + 1 < sizes.size(); ++n) {
        const std::string name = "layer" + std::to_string(n);
        same = fits(2 * n, name + ".weight", {sizes[n], sizes[n + 1]}) && fits(2 * n + 1, name + ".bias", {sizes[n + 1]});
        const int at = static_cast<int>(2 * n);
        if (same)
            layers_.push_back({sizes[n], sizes[n + 1], manifest.tensors(at).offset(), manifest.tensors(at + 1).offset()});
    }
    if (!same) throw TaskError("the run's tensors are not those of digits with hidden=" + hidden);
    load(file);
}

void Digits::load(const std::string& file) {
    const std::string text = unpacked(file);
    std::vector<std::uint8_t> values;
    for (const char *at = text.data(), *end = at + text.size(); at < end;) {
        std::uint8_t value = 0;
        const auto [stop, error] = std::from_chars(at, end, value);
        if (error != std::errc()) throw TaskError(file + " is no table of numbers; copy it again");
        values.push_back(value);
        at = std::find_if(stop, end, [](char c) { return c >= '0' && c <= '9'; });
    }
    if (values.size() != kSamples * (kPixels + 1))
        throw TaskError(file + " has " + std::to_string(values.size()) + " numbers, not those of 1,797 digits");
    const Shuffle shuffle(kSplitSeed, 0, kSamples);
    for (std::size_t position = 0; position < kSamples; ++position) {
        const auto row = values.begin() + shuffle(position) * static_cast<std::int64_t>(kPixels + 1);
        Split& split = position < kTrain ? train_ : test_;
        split.images.insert(split.images.end(), row, row + kPixels);
        split.labels.push_back(row[kPixels]);
    }
}

Sums Digits::forward(const Split& split, const float* weights, const std::vector<std::int64_t>& samples,
                     std::vector<Matrix>& activations) const {
    const std::size_t rows = samples.size();
    activations.assign(1, Matrix(rows * kPixels));
    for (std::size_t r = 0; r < rows; ++r) {
        const auto image = split.images.begin() + samples[r] * static_cast<std::int64_t>(kPixels);
        std::transform(image, image + kPixels, activations[0].begin() + static_cast<std::ptrdiff_t>(r * kPixels),
                       [](std::uint8_t pixel) { return static_cast<float>(pixel) * kScale; });
    }
    std::vector<double> sums;
    for (const Layer& layer : layers_) {
        Matrix& below = activations.back();
        if (&layer != &layers_.front())
            for (float& x : below) x = x < 0 ? 0 : x;  // a NaN stays one
        sums.assign(rows * layer.outputs, 0);
        for (std::size_t i = 0; i < layer.inputs; ++i) {  // each weight is read once
            const float* weight = weights + layer.weight + i * layer.outputs;
            for (std::size_t r = 0; r < rows; ++r) {
                const double x = below[r * layer.inputs + i];
                double* sum = sums.data() + r * layer.outputs;
                for (std::size_t o = 0; o < layer.outputs; ++o) sum[o] += x * weight[o];
            }
        }
        Matrix above(rows * layer.outputs);
        for (std::size_t n = 0; n < above.size(); ++n)
            above[n] = static_cast<float>(sums[n] + weights[layer.bias + static_cast<std::ptrdiff_t>(n % layer.outputs)]);
        activations.push_back(std::move(above));
    }
    Sums found;
    double correct = 0;
    for (std::size_t r = 0; r < rows; ++r) {
        float* logits = activations.back().data() + r * kClasses;
        const std::size_t label = split.labels[static_cast<std::size_t>(samples[r])];
        const float* best = std::max_element(logits, logits + kClasses);
        correct += best == logits + label;
        const float most = *best, at_label = logits[label] - most;  // the largest is 0 then: exp cannot overflow
        double total = 0;
        for (std::size_t o = 0; o < kClasses; ++o) total += logits[o] = std::exp(logits[o] - most);
        found.loss += std::log(total) - at_label;
    }
    found.count = static_cast<std::int64_t>(rows);
    found.metrics["accuracy"] = correct;
    return found;
}

Sums Digits::gradient(const float* weights, const std::vector<std::int64_t>& samples, float* out) const {
    const std::size_t rows = samples.size();
    std::vector<Matrix> activations;
    const Sums found = forward(train_, weights, samples, activations);
    // softmax less 1 at the label
    Matrix delta = activations.back();
    for (std::size_t r = 0; r < rows; ++r) {
        float* row = delta.data() + r * kClasses;
        double total = 0;
        for (std::size_t o = 0; o < kClasses; ++o) total += row[o];
        for (std::size_t o = 0; o < kClasses; ++o) row[o] = static_cast<float>(row[o] / total);
        row[train_.labels[static_cast<std::size_t>(samples[r])]] -= 1;
    }
    std::vector<double> sums;
    for (std::size_t n = layers_.size(); n-- > 0;) {
        const Layer& layer = layers_[n];
        const Matrix& inputs = activations[n];
        for (std::size_t i = 0; i <= layer.inputs; ++i) {  // the bias is one more input, which is always 1
            const bool bias = i == layer.inputs;
            sums.assign(layer.outputs, 0);
            for (std::size_t r = 0; r < rows; ++r) {
                const double x = bias ? 1 : inputs[r * layer.inputs + i];
                const float* row = delta.data() + r * layer.outputs;
                for (std::size_t o = 0; o < layer.outputs; ++o) sums[o] += x * row[o];
            }
            float* target = out + (bias ? layer.bias : layer.weight + static_cast<std::int64_t>(i * layer.outputs));
            std::transform(sums.begin(), sums.end(), target, [](double sum) { return static_cast<float>(sum); });
        }
        if (n == 0) break;
        Matrix below(rows * layer.inputs);
        for (std::size_t i = 0; i < layer.inputs; ++i) {
            const float* weight = weights + layer.weight + i * layer.outputs;
            for (std::size_t r = 0; r < rows; ++r) {
                const float* row = delta.data() + r * layer.outputs;
                double sum = 0;
                for (std::size_t o = 0; o < layer.outputs; ++o) sum += static_cast<double>(row[o]) * weight[o];
                below[r * layer.inputs + i] = static_cast<float>(sum) * (inputs[r * layer.inputs + i] > 0 ? 1.0f : 0.0f);
            }
        }
        delta = std::move(below);
    }
    return found;
}

Sums Digits::evaluate(const float* weights, const std::vector<std::int64_t>& samples) const {
    std::vector<Matrix> activations;
    return forward(test_, weights, samples, activations);
}

}  // namespace armillary
