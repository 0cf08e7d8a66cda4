#include "compute.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <stdexcept>
#include <utility>

namespace armillary {

namespace {

struct NotFinite : std::runtime_error {
    using std::runtime_error::runtime_error;
};

}  // namespace

Computer::Computer(const pb::Manifest& manifest, const Digits& task, const Sampler& sampler,
                   int evaluation_microbatches, Dtype dtype, bool skips_nonfinite)
    : manifest_(manifest),
      size_(static_cast<std::size_t>(flat_size(manifest))),
      task_(task),
      sampler_(sampler),
      evaluation_microbatches_(evaluation_microbatches),
      dtype_(dtype),
      skips_nonfinite_(skips_nonfinite) {}

void Computer::compute(Unit& unit) const {
    const auto started = std::chrono::steady_clock::now();
    int index = unit.block.lo;
    try {
        unit.held = block(unit, unit.block, index);
        if (unit.held && unit.held->gradient) unit.held->crc = crc32c(unit.held->gradient->data(), 4 * size_);
    } catch (const std::exception& error) {
        Failure failure;
        failure.microbatch = index;
        failure.error = error.what();
        failure.invalid = dynamic_cast<const NotFinite*>(&error) != nullptr;
        if (unit.train) failure.samples = samples_of(unit, index);
        if (failure.samples.size() > kMostSamplesNamed) failure.samples.resize(kMostSamplesNamed);
        unit.failure = std::move(failure);
    }
    unit.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
}

std::vector<std::int64_t> Computer::samples_of(const Unit& unit, int index) const {
    return unit.train ? sampler_.microbatch(unit.step, index)
                      : Sampler::slice(task_.test_size(), evaluation_microbatches_, index);
}

// Depth first and left before right: at most log2(width) + 1 gradients at a time. None where it was cancelled.
std::optional<Held> Computer::block(Unit& unit, const Block& part, int& index) const {
    if (unit.cancelled) return std::nullopt;
    if (part.width() == 1) {
        index = part.lo;
        return microbatch(unit, index);
    }
    const auto [left_part, right_part] = halves(part);
    std::optional<Held> left = block(unit, left_part, index);
    if (!left) return std::nullopt;
    std::optional<Held> right = block(unit, right_part, index);
    if (!right) return std::nullopt;
    left->skipped.insert(left->skipped.end(), right->skipped.begin(), right->skipped.end());
    if (!right->sums) return left;
    if (!left->sums) {  // absent + x is x as it stands
        right->skipped = std::move(left->skipped);
        return right;
    }
    left->sums->add(*right->sums);
    if (left->gradient) add(dtype_, left->gradient->data(), right->gradient->data(), size_);
    return left;
}

Held Computer::microbatch(Unit& unit, int index) const {
    Held held;
    const std::vector<std::int64_t> samples = samples_of(unit, index);
    if (samples.empty()) return held;
    Skipped verdict{index, {}, {samples.begin(), samples.begin() + static_cast<std::ptrdiff_t>(std::min(
                                                                      samples.size(), kMostSamplesNamed))}};
    auto gradient = std::make_unique<Buffer>(unit.train ? size_ : 0);  // the padding is zeros
    Sums sums = unit.train ? task_.gradient(unit.weights->data(), samples, gradient->data())
                           : task_.evaluate(unit.weights->data(), samples);
    round_to(dtype_, gradient->data(), gradient->size());
    check(sums, *gradient, verdict);  // after rounding, which may make infinite what was not (N21)
    if (unit.train) {
        ++unit.microbatches;
        unit.samples += static_cast<std::int64_t>(samples.size());
    }
    if (verdict.tensors.empty()) {
        held.sums = std::move(sums);
        if (unit.train) held.gradient = std::move(gradient);
    } else if (unit.train && skips_nonfinite_) {
        held.skipped.push_back(std::move(verdict));
    } else {
        std::string names;
        for (const std::string& name : verdict.tensors) names += (names.empty() ? "" : ", ") + name;
        throw NotFinite("not finite: " + names);
    }
    return held;
}

// Names in the verdict what is not finite.
void Computer::check(const Sums& sums, const Buffer& gradient, Skipped& verdict) const {
    std::vector<std::string>& bad = verdict.tensors;
    if (!std::isfinite(sums.loss)) bad.push_back("(loss)");
    for (const auto& [name, value] : sums.metrics)
        if (!std::isfinite(value)) bad.push_back("(metric " + name + ")");
    for (const pb::Tensor& tensor : manifest_.tensors()) {
        if (gradient.empty() || bad.size() >= kMostTensorsNamed) break;
        const auto from = gradient.begin() + tensor.offset();
        if (!std::all_of(from, from + tensor_size(tensor), [](float x) { return std::isfinite(x); }))
            bad.push_back(tensor.name());
    }
}

}  // namespace armillary
