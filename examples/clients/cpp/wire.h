// What the protocol fixes to the bit: canonical blocks, checksums, digests, narrower types, the shuffle.
//
// The recipes are those of docs/protocol.md and docs/protocol-shuffle.md; `worker --vectors` holds this file to the
// golden vectors of protos/testdata. Pure: no I/O, no state.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "spheres/v1/common.pb.h"

namespace armillary {

namespace pb = spheres::v1;

inline constexpr int kProtocolVersion = 1;
inline constexpr int kMostMessageBytes = 1'153'433;
inline constexpr int kMostMicrobatches = 4096;

// ---- canonical blocks

// The microbatches lo to hi - 1.
struct Block {
    int lo = 0, hi = 0;

    int width() const { return hi - lo; }
    bool contains(const Block& other) const { return lo <= other.lo && other.hi <= hi; }
    bool operator==(const Block& other) const { return lo == other.lo && hi == other.hi; }
    bool operator<(const Block& other) const { return std::tie(lo, hi) < std::tie(other.lo, other.hi); }
    std::string text() const { return "[" + std::to_string(lo) + "," + std::to_string(hi) + ")"; }
};

// The two canonical blocks whose sum, left + right, is this one; it has at least two microbatches.
std::pair<Block, Block> halves(const Block& block);

// Whether the block is a node of the tree over so many microbatches.
bool is_canonical(const Block& block, int total);

// The maximal canonical blocks below `top` whose microbatches are all in the set, in order.
std::vector<Block> decompose(const std::vector<bool>& set, const Block& top);

// ---- checksums and digests

// CRC-32C of a buffer, or of all up to its end where `before` came first.
std::uint32_t crc32c(const void* data, std::size_t size, std::uint32_t before = 0);

// 32 bytes.
std::string sha256(std::string_view data);

std::string hex(std::string_view bytes);

// The text that the manifest's digest is taken over, and that digest.
std::string manifest_text(const pb::Manifest& manifest);
std::string manifest_digest(const pb::Manifest& manifest);

std::int64_t tensor_size(const pb::Tensor& tensor);

// Elements of the flat buffer, padding included.
std::int64_t flat_size(const pb::Manifest& manifest);

// Digest of a version of the weights, from the checksums of its chunks.
std::string version_digest(const std::string& manifest_digest, const std::vector<std::uint32_t>& checksums);

// ---- types on the wire

enum class Dtype { kFloat32 = 4, kBfloat16 = 2 };  // the value is the bytes of an element on the wire

// The upper half of what a float32 rounds to: to nearest, ties to even.
std::uint16_t to_bfloat16(float value);
float from_bfloat16(std::uint16_t half);

// Rounds in place; float32 stays as it is.
void round_to(Dtype dtype, float* values, std::size_t count);

std::string to_wire(Dtype dtype, const float* values, std::size_t count);
void from_wire(Dtype dtype, std::string_view bytes, float* values);

// A node of the canonical sum: left + right in float32, then rounded, into left.
void add(Dtype dtype, float* left, const float* right, std::size_t count);

// ---- which samples

std::uint64_t mix(std::uint64_t word);

// The order of one epoch: a bijection of 0 .. size - 1.
class Shuffle {
public:
    Shuffle(std::uint64_t seed, std::uint64_t epoch, std::uint64_t size);
    std::int64_t operator()(std::uint64_t position) const;

private:
    static constexpr int kRounds = 6;
    std::uint64_t size_, keys_[kRounds];
    int half_ = 1;
};

// Sample ids of microbatches and of slices of the test split.
struct Sampler {
    std::uint64_t seed = 0;
    std::int64_t size = 0, batch_size = 1, microbatches = 1;

    // Of a training step.
    std::vector<std::int64_t> microbatch(std::int64_t step, int index) const;

    // Slice `index` of `total` of a test split of so many samples, in order.
    static std::vector<std::int64_t> slice(std::int64_t test_size, int total, int index);
};

}  // namespace armillary
