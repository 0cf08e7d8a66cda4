#include "vectors.h"

#include <google/protobuf/message.h>
#include <google/protobuf/struct.pb.h>
#include <google/protobuf/util/json_util.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <memory>
#include <sstream>
#include <vector>

#include "spheres/v1/control.pb.h"
#include "spheres/v1/work.pb.h"
#include "wire.h"

namespace armillary {

namespace {

using google::protobuf::ListValue;
using google::protobuf::Struct;
using google::protobuf::Value;

// One file: what has been compared, and what is wrong.
class Report {
public:
    void same(const std::string& what, const std::string& found, const std::string& expected) {
        ++count_;
        if (found != expected) wrong_.push_back(what + ": " + found + ", expected " + expected);
    }
    bool print(const std::string& file, const std::string& note) const {
        std::printf("%s: %s%zu values%s\n", file.c_str(), wrong_.empty() ? "ok, " : "WRONG, ", count_, note.c_str());
        for (const std::string& line : wrong_) std::printf("  %s\n", line.c_str());
        return wrong_.empty() && count_ > 0;
    }

private:
    std::size_t count_ = 0;
    std::vector<std::string> wrong_;
};

// ---- reading JSON; a name that is not there throws

const Value& at(const Struct& record, const std::string& name) {
    const auto found = record.fields().find(name);
    if (found == record.fields().end()) throw std::runtime_error("there is no " + name);
    return found->second;
}
const std::string& text(const Struct& record, const std::string& name) { return at(record, name).string_value(); }
std::int64_t whole(const Struct& record, const std::string& name) {
    return static_cast<std::int64_t>(at(record, name).number_value());
}
const ListValue& list(const Struct& record, const std::string& name) { return at(record, name).list_value(); }
std::uint64_t seed_of(const Struct& record) { return std::stoull(text(record, "seed")); }
std::uint64_t word_of(const std::string& digits) { return std::stoull(digits, nullptr, 16); }

std::string bytes_of(const std::string& digits) {
    std::string bytes;
    for (std::size_t n = 0; n + 1 < digits.size(); n += 2)
        bytes += static_cast<char>(std::stoi(digits.substr(n, 2), nullptr, 16));
    return bytes;
}

std::string hex_of(std::uint64_t word, int digits) {
    char buffer[20];
    std::snprintf(buffer, sizeof buffer, "%0*llx", digits, static_cast<unsigned long long>(word));
    return buffer;
}

float float_of(const std::string& digits) {
    float value = 0;
    from_wire(Dtype::kFloat32, bytes_of(digits).substr(0, 4), &value);
    return value;
}
std::string hex_of(float value) { return hex(to_wire(Dtype::kFloat32, &value, 1)); }

std::string joined(const std::vector<std::int64_t>& numbers) {
    std::string out;
    for (const std::int64_t number : numbers) out += std::to_string(number) + " ";
    return out;
}
std::string joined(const ListValue& numbers) {
    std::vector<std::int64_t> found;
    for (const Value& value : numbers.values()) found.push_back(static_cast<std::int64_t>(value.number_value()));
    return joined(found);
}

// ---- the files

void shuffle(const Struct& file, Report& report) {
    for (const Value& item : list(file, "mix64").values()) {
        const std::string& word = text(item.struct_value(), "word");
        report.same("mix " + word, hex_of(mix(word_of(word)), 16), text(item.struct_value(), "mixed"));
    }
    for (const Value& item : list(file, "shuffles").values()) {
        const Struct& one = item.struct_value();
        const Shuffle order(seed_of(one), static_cast<std::uint64_t>(whole(one, "epoch")),
                            static_cast<std::uint64_t>(whole(one, "size")));
        std::vector<std::int64_t> found;
        for (const Value& position : list(one, "positions").values())
            found.push_back(order(static_cast<std::uint64_t>(position.number_value())));
        report.same("shuffle of " + std::to_string(whole(one, "size")), joined(found), joined(list(one, "samples")));
    }
    for (const Value& item : list(file, "microbatches").values()) {
        const Struct& one = item.struct_value();
        const Sampler sampler{seed_of(one), whole(one, "size"), whole(one, "batch_size"), whole(one, "microbatches")};
        report.same("microbatch of step " + std::to_string(whole(one, "step")),
                    joined(sampler.microbatch(whole(one, "step"), static_cast<int>(whole(one, "index")))),
                    joined(list(one, "samples")));
    }
}

// Philox4x64-10, four words. Only here: the gradient of digits draws nothing.
std::vector<std::uint64_t> philox(std::uint64_t key0, std::uint64_t key1, std::vector<std::uint64_t> counter) {
    for (int round = 0; round < 10; ++round, key0 += 0x9E3779B97F4A7C15, key1 += 0xBB67AE8584CAA73B) {
        __extension__ using Wide = unsigned __int128;
        const Wide a = Wide{0xD2E7470EE14C6C93} * counter[0], b = Wide{0xCA5A826395121157} * counter[2];
        counter = {static_cast<std::uint64_t>(b >> 64) ^ counter[1] ^ key0, static_cast<std::uint64_t>(b),
                   static_cast<std::uint64_t>(a >> 64) ^ counter[3] ^ key1, static_cast<std::uint64_t>(a)};
    }
    return counter;
}

void randomness(const Struct& file, Report& report) {
    for (const Value& item : list(file, "first_words").values()) {
        const Struct& one = item.struct_value();
        std::uint64_t count = 0;
        std::vector<std::uint64_t> words;
        for (const Value& expected : list(one, "words").values()) {
            if (count % 4 == 0)
                words = philox(seed_of(one), static_cast<std::uint64_t>(whole(one, "step")),
                               {count / 4 + 1, 0, 0, static_cast<std::uint64_t>(whole(one, "index"))});
            report.same("word " + std::to_string(count), hex_of(words[count % 4], 16), expected.string_value());
            ++count;
        }
    }
}

pb::Manifest manifest_of(const Struct& record) {
    pb::Manifest manifest;
    for (const Value& item : list(record, "tensors").values()) {
        pb::Tensor& tensor = *manifest.add_tensors();
        tensor.set_name(text(item.struct_value(), "name"));
        tensor.set_dtype(text(item.struct_value(), "dtype"));
        tensor.set_offset(whole(item.struct_value(), "offset"));
        for (const Value& axis : list(item.struct_value(), "shape").values())
            tensor.add_shape(static_cast<std::int64_t>(axis.number_value()));
    }
    return manifest;
}

void digests(const Struct& file, Report& report) {
    for (const Value& item : list(file, "crc32c").values()) {
        const std::string& data = text(item.struct_value(), "text");
        report.same("CRC-32C of '" + data + "'", hex_of(crc32c(data.data(), data.size()), 8), text(item.struct_value(), "crc32c"));
    }
    std::map<std::string, pb::Manifest> manifests;
    for (const Value& item : list(file, "manifests").values()) {
        const Struct& one = item.struct_value();
        const pb::Manifest manifest = manifests[text(one, "digest")] = manifest_of(one);
        report.same("text of a manifest", manifest_text(manifest), text(one, "text"));
        report.same("digest of a manifest", hex(manifest_digest(manifest)), text(one, "digest"));
        report.same("elements of a manifest", std::to_string(flat_size(manifest)), std::to_string(whole(one, "elements")));
    }
    for (const Value& item : list(file, "versions").values()) {
        const Struct& one = item.struct_value();
        const std::string flat = bytes_of(text(one, "flat")), &layout = text(one, "manifest_digest");
        const auto chunk_bytes = static_cast<std::size_t>(whole(one, "chunk_bytes"));
        std::vector<std::uint32_t> checksums;
        std::string found, expected, unpadded;
        for (std::size_t first = 0; first < flat.size(); first += chunk_bytes) {
            checksums.push_back(crc32c(flat.data() + first, std::min(chunk_bytes, flat.size() - first)));
            found += hex_of(checksums.back(), 8);
        }
        for (const Value& checksum : list(one, "checksums").values()) expected += checksum.string_value();
        report.same("checksums of chunks", found, expected);
        report.same("digest of a version", hex(version_digest(bytes_of(layout), checksums)), text(one, "digest"));
        for (const pb::Tensor& tensor : manifests.at(layout).tensors())
            unpadded += flat.substr(static_cast<std::size_t>(4 * tensor.offset()), static_cast<std::size_t>(4 * tensor_size(tensor)));
        report.same("weights_sha256", hex(sha256(unpadded)), text(one, "sha256_without_padding"));
    }
}

// The canonical sum of leaves, each one number or absent; "" where all are.
std::string canonical_sum(const ListValue& leaves, const Block& block, Dtype dtype) {
    if (block.width() == 1) return leaves.values(block.lo).string_value();  // of null it is empty
    const auto [left_part, right_part] = halves(block);
    const std::string left = canonical_sum(leaves, left_part, dtype), right = canonical_sum(leaves, right_part, dtype);
    if (left.empty() || right.empty()) return left + right;
    float sum = float_of(left), other = float_of(right);
    add(dtype, &sum, &other, 1);
    return hex_of(sum);
}

void canonical_sums(const Struct& file, Report& report, Dtype dtype) {
    for (const Value& item : list(file, "sums").values()) {
        const ListValue& leaves = list(item.struct_value(), "leaves");
        report.same("canonical sum", canonical_sum(leaves, {0, leaves.values_size()}, dtype), text(item.struct_value(), "sum"));
    }
}

void sums(const Struct& file, Report& report) {
    for (const Value& item : list(file, "decompositions").values()) {
        const Struct& one = item.struct_value();
        const auto total = static_cast<int>(whole(one, "microbatches"));
        std::vector<bool> set(static_cast<std::size_t>(total));
        const ListValue& range = list(one, "range");
        for (int n = 0; n < total; ++n)
            set[static_cast<std::size_t>(n)] = range.values(0).number_value() <= n && n < range.values(1).number_value();
        std::string found, expected;
        for (const Block& block : decompose(set, {0, total})) found += block.text() + (is_canonical(block, total) ? "" : "?");
        for (const Value& block : list(one, "blocks").values())
            expected += Block{static_cast<int>(block.list_value().values(0).number_value()),
                              static_cast<int>(block.list_value().values(1).number_value())}.text();
        report.same("cut of a range", found, expected);
    }
    canonical_sums(file, report, Dtype::kFloat32);
    for (const Value& item : list(file, "means").values()) {
        const Struct& one = item.struct_value();
        const auto factor = static_cast<float>(1.0 / static_cast<double>(whole(one, "count")));
        report.same("mean", hex_of(float_of(text(one, "sum")) * factor), text(one, "mean"));
    }
}

void rounding(const Struct& file, Report& report) {
    for (const Value& item : list(file, "bfloat16").values()) {
        const Struct& one = item.struct_value();
        float value = float_of(text(one, "value"));
        const std::string wire = to_wire(Dtype::kBfloat16, &value, 1);
        report.same("wire of " + text(one, "value"), hex(wire), text(one, "wire"));
        round_to(Dtype::kBfloat16, &value, 1);
        report.same("rounded " + text(one, "value"), hex_of(value), text(one, "rounded"));
        from_wire(Dtype::kBfloat16, wire, &value);
        report.same("from the wire", hex_of(value), text(one, "rounded"));
    }
    canonical_sums(file, report, Dtype::kBfloat16);
}

void check_chunk(const std::string& what, const pb::Chunk& chunk, Report& report) {
    report.same(what + "'s checksum", hex_of(crc32c(chunk.data().data(), chunk.data().size()), 8), hex_of(chunk.crc32c(), 8));
}

// A message by its name: decoded and encoded again, and made of what JSON says is in it.
std::unique_ptr<google::protobuf::Message> check_message(const Struct& one, Report& report) {
    const std::string &name = text(one, "name"), bytes = bytes_of(text(one, "bytes"));
    const auto* kind = google::protobuf::DescriptorPool::generated_pool()->FindMessageTypeByName(text(one, "message"));
    if (!kind) throw std::runtime_error("there is no message " + text(one, "message"));
    const auto* prototype = google::protobuf::MessageFactory::generated_factory()->GetPrototype(kind);
    std::unique_ptr<google::protobuf::Message> message(prototype->New());
    report.same(name + " decodes", message->ParseFromString(bytes) ? "yes" : "no", "yes");
    report.same(name + " encoded again", hex(message->SerializeAsString()), hex(bytes));
    if (one.fields().count("value")) {
        const std::unique_ptr<google::protobuf::Message> made(prototype->New());
        std::string json;
        const bool read = google::protobuf::util::MessageToJsonString(at(one, "value"), &json).ok() &&
                          google::protobuf::util::JsonStringToMessage(json, made.get()).ok();
        report.same(name + " of its JSON", read ? hex(made->SerializeAsString()) : "no", hex(bytes));
    }
    return message;
}

void control(const Struct& file, Report& report) {
    for (const Value& item : list(file, "frames").values()) check_message(item.struct_value(), report);
}

void frames(const Struct& file, Report& report) {
    std::string digest;  // of the weights, which the gradient's header names again
    for (const Value& item : list(file, "frames").values()) {
        const std::unique_ptr<google::protobuf::Message> message = check_message(item.struct_value(), report);
        const std::string& name = text(item.struct_value(), "name");
        if (const auto* request = dynamic_cast<const pb::WorkRequest*>(message.get())) {
            if (request->has_gradient_chunk()) check_chunk(name, request->gradient_chunk(), report);
            if (request->has_gradient_header())
                report.same(name + "'s weights", hex(request->gradient_header().weights_digest()), digest);
        } else if (const auto* response = dynamic_cast<const pb::WorkResponse*>(message.get())) {
            if (response->has_weights_chunk()) check_chunk(name, response->weights_chunk(), report);
            if (!response->has_weights_footer()) continue;
            const std::uint32_t crc = response->has_weights_chunk() ? response->weights_chunk().crc32c()
                                                                    : response->weights_reference().crc32c(0);
            digest = hex(response->weights_footer().digest());
            const std::string& layout = response->weights_header().manifest_digest();
            report.same(name + "'s digest", hex(version_digest(layout, {crc})), digest);
        }
    }
}

}  // namespace

bool check_vectors(const std::string& folder) {
    struct Check {
        std::function<void(const Struct&, Report&)> run;
        const char* note = "";
    };
    const std::map<std::string, Check> checks = {
        {"control.json", {control}},
        {"digests.json", {digests}},
        {"frames.json", {frames, " (those by reference are decoded only: this worker shares no memory)"}},
        {"randomness.json", {randomness, " (not used by digits, whose gradient draws no random number)"}},
        {"rounding.json", {rounding}},
        {"shuffle.json", {shuffle}},
        {"sums.json", {sums}},
    };
    std::error_code error;
    std::vector<std::string> names;
    for (const auto& entry : std::filesystem::directory_iterator(folder, error)) names.push_back(entry.path().filename());
    for (const auto& [name, _] : checks)
        if (std::find(names.begin(), names.end(), name) == names.end()) names.push_back(name);
    std::sort(names.begin(), names.end());
    bool good = true;
    for (const std::string& name : names) {
        std::ifstream stream(std::filesystem::path(folder) / name);
        std::stringstream content;
        content << stream.rdbuf();
        Struct file;
        const auto check = checks.find(name);
        Report report;
        try {
            if (check == checks.end()) throw std::runtime_error("not known here");
            if (!stream) throw std::runtime_error("cannot be read");
            if (!google::protobuf::util::JsonStringToMessage(content.str(), &file).ok()) throw std::runtime_error("is no JSON");
            check->second.run(file, report);
            good = report.print(name, check->second.note) && good;
        } catch (const std::exception& wrong) {
            std::printf("%s: WRONG, %s\n", name.c_str(), wrong.what());
            good = false;
        }
    }
    return good;
}

}  // namespace armillary
