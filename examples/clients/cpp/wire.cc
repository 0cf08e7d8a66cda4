#include "wire.h"

#include <openssl/sha.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <numeric>

namespace armillary {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "numbers go on the wire as they lie in memory");

std::pair<Block, Block> halves(const Block& block) {
    int half = 1;
    while (2 * half < block.width()) half *= 2;
    return {{block.lo, block.lo + half}, {block.lo + half, block.hi}};
}

bool is_canonical(const Block& block, int total) {
    if (block.lo < 0 || block.lo >= block.hi || block.hi > total) return false;
    int width = 1;
    while (width < block.width()) width *= 2;
    return block.lo % width == 0 && block.hi == std::min(block.lo + width, total);
}

std::vector<Block> decompose(const std::vector<bool>& set, const Block& top) {
    const auto from = set.begin() + top.lo, to = set.begin() + top.hi;
    if (std::find(from, to, true) == to) return {};
    if (std::find(from, to, false) == to) return {top};
    const auto [left, right] = halves(top);
    std::vector<Block> found = decompose(set, left);
    const std::vector<Block> others = decompose(set, right);
    found.insert(found.end(), others.begin(), others.end());
    return found;
}

namespace {

std::array<std::uint32_t, 256> crc_table() {
    std::array<std::uint32_t, 256> table{};
    for (std::uint32_t byte = 0; byte < table.size(); ++byte) {
        std::uint32_t word = byte;
        for (int bit = 0; bit < 8; ++bit) word = word >> 1 ^ (word & 1 ? 0x82F63B78u : 0u);
        table[byte] = word;
    }
    return table;
}

std::uint32_t crc_portable(const unsigned char* data, std::size_t size, std::uint32_t crc) {
    static const std::array<std::uint32_t, 256> table = crc_table();
    for (std::size_t i = 0; i < size; ++i) crc = crc >> 8 ^ table[(crc ^ data[i]) & 0xFF];
    return crc;
}

#ifdef __x86_64__
__attribute__((target("sse4.2"))) std::uint32_t crc_sse42(const unsigned char* data, std::size_t size,
                                                          std::uint32_t crc) {
    std::uint64_t wide = crc;
    for (; size >= 8; data += 8, size -= 8) {
        std::uint64_t word;
        std::memcpy(&word, data, 8);
        wide = __builtin_ia32_crc32di(wide, word);
    }
    return crc_portable(data, size, static_cast<std::uint32_t>(wide));
}
#endif

std::uint32_t bits_of(float value) {
    std::uint32_t word;
    std::memcpy(&word, &value, 4);
    return word;
}

// As Python's json.dumps: what is not ASCII as \uXXXX, beyond the first plane as two of them.
std::string json_string(const std::string& text) {
    std::string out = "\"";
    const auto escape = [&out](unsigned unit) {
        char buffer[8];
        std::snprintf(buffer, sizeof buffer, "\\u%04x", unit & 0xFFFF);
        out += buffer;
    };
    for (std::size_t i = 0; i < text.size();) {
        const auto lead = static_cast<unsigned char>(text[i++]);
        if (lead < 0x80) {
            static constexpr std::string_view kPlain = "\"\\\b\f\n\r\t", kNamed = "\"\\bfnrt";
            if (const std::size_t at = kPlain.find(static_cast<char>(lead)); at != std::string_view::npos)
                (out += '\\') += kNamed[at];
            else if (lead < 0x20)
                escape(lead);
            else
                out += static_cast<char>(lead);
            continue;
        }
        const int more = lead >= 0xF0 ? 3 : lead >= 0xE0 ? 2 : 1;
        unsigned point = lead & (0x3F >> more);
        for (int n = 0; n < more && i < text.size(); ++n) point = point << 6 | (text[i++] & 0x3F);
        if (point >= 0x10000) {
            escape(0xD800 + ((point - 0x10000) >> 10));
            escape(0xDC00 + ((point - 0x10000) & 0x3FF));
        } else {
            escape(point);
        }
    }
    return out + '"';
}

}  // namespace

std::uint32_t crc32c(const void* data, std::size_t size, std::uint32_t before) {
    const auto* bytes = static_cast<const unsigned char*>(data);
#ifdef __x86_64__
    static const bool hardware = __builtin_cpu_supports("sse4.2");
    if (hardware) return ~crc_sse42(bytes, size, ~before);
#endif
    return ~crc_portable(bytes, size, ~before);
}

std::string sha256(std::string_view data) {
    std::string digest(SHA256_DIGEST_LENGTH, '\0');
    SHA256(reinterpret_cast<const unsigned char*>(data.data()), data.size(),
           reinterpret_cast<unsigned char*>(digest.data()));
    return digest;
}

std::string hex(std::string_view bytes) {
    static constexpr char kDigits[] = "0123456789abcdef";
    std::string out;
    for (const char c : bytes) {
        const auto byte = static_cast<unsigned char>(c);
        (out += kDigits[byte >> 4]) += kDigits[byte & 15];
    }
    return out;
}

std::string manifest_text(const pb::Manifest& manifest) {
    std::string text = "[";
    for (const pb::Tensor& tensor : manifest.tensors()) {
        if (text.size() > 1) text += ',';
        text += '[' + json_string(tensor.name()) + ",[";
        for (int axis = 0; axis < tensor.shape_size(); ++axis)
            text += (axis ? "," : "") + std::to_string(tensor.shape(axis));
        text += "]," + std::to_string(tensor.offset()) + ',' + json_string(tensor.dtype()) + ']';
    }
    return text + ']';
}

std::string manifest_digest(const pb::Manifest& manifest) { return sha256(manifest_text(manifest)).substr(0, 16); }

std::int64_t tensor_size(const pb::Tensor& tensor) {
    return std::accumulate(tensor.shape().begin(), tensor.shape().end(), std::int64_t{1}, std::multiplies<>());
}

std::int64_t flat_size(const pb::Manifest& manifest) {
    if (manifest.tensors().empty()) return 0;
    const pb::Tensor& last = *manifest.tensors().rbegin();
    return last.offset() + (tensor_size(last) + 15) / 16 * 16;
}

std::string version_digest(const std::string& manifest_digest, const std::vector<std::uint32_t>& checksums) {
    std::string text = manifest_digest;
    text.append(reinterpret_cast<const char*>(checksums.data()), 4 * checksums.size());
    return sha256(text).substr(0, 16);
}

std::uint16_t to_bfloat16(float value) {
    const std::uint32_t word = bits_of(value);
    if (std::isnan(value)) return static_cast<std::uint16_t>(word >> 16 | 0x40);  // rounding could carry into the sign
    return static_cast<std::uint16_t>((word + 0x7FFF + (word >> 16 & 1)) >> 16);
}

float from_bfloat16(std::uint16_t half) {
    const std::uint32_t word = std::uint32_t{half} << 16;
    float value;
    std::memcpy(&value, &word, 4);
    return value;
}

void round_to(Dtype dtype, float* values, std::size_t count) {
    if (dtype == Dtype::kFloat32) return;
    for (std::size_t i = 0; i < count; ++i) values[i] = from_bfloat16(to_bfloat16(values[i]));
}

std::string to_wire(Dtype dtype, const float* values, std::size_t count) {
    std::string bytes(count * static_cast<std::size_t>(dtype), '\0');
    if (dtype == Dtype::kFloat32) {
        std::memcpy(bytes.data(), values, bytes.size());
        return bytes;
    }
    for (std::size_t i = 0; i < count; ++i) {
        const std::uint16_t half = to_bfloat16(values[i]);
        std::memcpy(bytes.data() + 2 * i, &half, 2);
    }
    return bytes;
}

void from_wire(Dtype dtype, std::string_view bytes, float* values) {
    if (dtype == Dtype::kFloat32) {
        std::memcpy(values, bytes.data(), bytes.size());
        return;
    }
    for (std::size_t i = 0; i < bytes.size() / 2; ++i) {
        std::uint16_t half;
        std::memcpy(&half, bytes.data() + 2 * i, 2);
        values[i] = from_bfloat16(half);
    }
}

void add(Dtype dtype, float* left, const float* right, std::size_t count) {
    for (std::size_t i = 0; i < count; ++i) left[i] += right[i];
    round_to(dtype, left, count);
}

std::uint64_t mix(std::uint64_t word) {
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9;
    word = (word ^ word >> 27) * 0x94D049BB133111EB;
    return word ^ word >> 31;
}

Shuffle::Shuffle(std::uint64_t seed, std::uint64_t epoch, std::uint64_t size) : size_(size) {
    static constexpr std::uint64_t kGolden = 0x9E3779B97F4A7C15;
    while ((std::uint64_t{1} << 2 * half_) < size) ++half_;
    const std::uint64_t start = mix(mix(seed + kGolden) + epoch);
    for (std::uint64_t round = 0; round < kRounds; ++round) keys_[round] = mix(start + (round + 1) * kGolden);
}

std::int64_t Shuffle::operator()(std::uint64_t position) const {
    std::uint64_t x = position;
    do {
        std::uint64_t left = x >> half_, right = x & ((std::uint64_t{1} << half_) - 1);
        for (const std::uint64_t key : keys_) {
            const std::uint64_t next = left ^ mix(right + key) >> (64 - half_);
            left = right;
            right = next;
        }
        x = left << half_ | right;
    } while (x >= size_);
    return static_cast<std::int64_t>(x);
}

std::vector<std::int64_t> Sampler::microbatch(std::int64_t step, int index) const {
    const std::int64_t steps = (size + batch_size - 1) / batch_size, first = step % steps * batch_size;
    const std::int64_t batch = std::min(batch_size, size - first);
    const std::int64_t lo = index * batch / microbatches, hi = (index + 1) * batch / microbatches;
    if (lo == hi) return {};
    const Shuffle shuffle(seed, static_cast<std::uint64_t>(step / steps), static_cast<std::uint64_t>(size));
    std::vector<std::int64_t> samples;
    for (std::int64_t position = lo; position < hi; ++position)
        samples.push_back(shuffle(static_cast<std::uint64_t>(first + position)));
    return samples;
}

std::vector<std::int64_t> Sampler::slice(std::int64_t test_size, int total, int index) {
    const std::int64_t lo = index * test_size / total, hi = (index + 1) * test_size / total;
    std::vector<std::int64_t> samples(static_cast<std::size_t>(hi - lo));
    std::iota(samples.begin(), samples.end(), lo);
    return samples;
}

}  // namespace armillary
