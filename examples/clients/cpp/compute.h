// Computes one block: the task's gradients, checked, rounded and summed in canonical order. Knows no wire.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "digits.h"
#include "wire.h"

namespace armillary {

inline constexpr std::size_t kMostTensorsNamed = 16, kMostSamplesNamed = 64;

using Buffer = std::vector<float>;  // flat: a model's weights, or a gradient

// A microbatch that was left out, since its gradient or its sums are not finite (N16).
struct Skipped {
    int microbatch = 0;
    std::vector<std::string> tensors;
    std::vector<std::int64_t> samples;
};

// A block that was computed: no gradient where no microbatch of it has one, and in an evaluation.
struct Held {
    std::unique_ptr<Buffer> gradient;
    std::optional<Sums> sums;  // none: absent
    std::vector<Skipped> skipped;
    std::uint32_t crc = 0;
};

struct Failure {
    int microbatch = 0;
    std::string error;
    std::vector<std::int64_t> samples;
    bool invalid = false;  // not finite, rather than an exception
};

// A block to compute, and what came of it: `held` or `failure`; neither where it was cancelled.
struct Unit {
    Block block;
    std::int64_t step = 0;
    bool train = true;
    std::shared_ptr<const Buffer> weights;
    std::atomic<bool> cancelled{false};

    std::optional<Held> held;
    std::optional<Failure> failure;
    std::int64_t samples = 0, microbatches = 0;
    double seconds = 0;
};

class Computer {
public:
    Computer(const pb::Manifest& manifest, const Digits& task, const Sampler& sampler, int evaluation_microbatches,
             Dtype dtype, bool skips_nonfinite);

    // For a thread that has nothing else to do.
    void compute(Unit& unit) const;

private:
    std::vector<std::int64_t> samples_of(const Unit& unit, int index) const;
    std::optional<Held> block(Unit& unit, const Block& part, int& index) const;
    Held microbatch(Unit& unit, int index) const;
    void check(const Sums& sums, const Buffer& gradient, Skipped& verdict) const;

    pb::Manifest manifest_;
    std::size_t size_;
    const Digits& task_;
    Sampler sampler_;
    int evaluation_microbatches_;
    Dtype dtype_;
    bool skips_nonfinite_;
};

}  // namespace armillary
