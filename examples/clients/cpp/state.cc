#include "state.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace armillary {

namespace {

// seconds for which a worker whose task has failed computes nothing, doubled each time up to the longest
constexpr double kAside = 2, kLongestAside = 64;
// verdicts of one header that say more than which microbatch it is
constexpr int kMostDetailed = 32;
// what protobuf puts around a chunk's data, at most
constexpr int kAroundChunk = 64;

Dtype dtype_of(pb::WireDtype dtype) {
    if (dtype == pb::WIRE_DTYPE_BFLOAT16) return Dtype::kBfloat16;
    if (dtype == pb::WIRE_DTYPE_FLOAT32 || dtype == pb::WIRE_DTYPE_UNSPECIFIED) return Dtype::kFloat32;
    throw LinkFault("DecodeError", "type " + std::to_string(dtype) + " on the wire is not known here");
}

void set(pb::Block* message, const Block& block) {
    message->set_lo(block.lo);
    message->set_hi(block.hi);
}

}  // namespace

State::State(const pb::SphereConfiguration& configuration, std::string sphere_id)
    : configuration_(configuration),
      id_(std::move(sphere_id)),
      size_(static_cast<std::size_t>(flat_size(configuration.manifest()))),
      gradient_dtype_(dtype_of(configuration.gradient_dtype())),
      weights_dtype_(dtype_of(configuration.weights_dtype())) {
    const pb::Manifest& manifest = configuration.manifest();
    if (manifest.tensors().empty() || manifest_digest(manifest) != manifest.digest())
        throw LinkFault("DecodeError", "the manifest does not fit its digest");
    const auto within = [](int value, int low, int high) { return low <= value && value <= high; };
    if (!within(configuration.chunk_bytes(), 4096, 1 << 20) || configuration.chunk_bytes() % 64 ||
        !within(configuration.microbatches_count(), 1, kMostMicrobatches) ||
        !within(configuration.evaluation_microbatches_count(), 1, kMostMicrobatches) || configuration.batch_size() < 1 ||
        configuration.train_size() < 1 || configuration.window_chunks() < 1)
        throw LinkFault("DecodeError", "the run's configuration is out of its limits");
    // A chunk has as many elements as chunk_bytes hold in the wider of the two types on the wire.
    const Dtype wider = std::max(gradient_dtype_, weights_dtype_);
    chunk_elements_ = static_cast<std::size_t>(configuration.chunk_bytes()) / static_cast<std::size_t>(wider);
    chunk_count_ = static_cast<int>((size_ + chunk_elements_ - 1) / chunk_elements_);
    weights_.checksums.resize(static_cast<std::size_t>(chunk_count_));
    weights_.flat = std::make_shared<Buffer>(size_);
}

Sampler State::sampler() const {
    return {static_cast<std::uint64_t>(configuration_.seed()), configuration_.train_size(), configuration_.batch_size(),
            configuration_.microbatches_count()};
}

std::size_t State::elements(int chunk) const {
    return std::min(chunk_elements_, size_ - static_cast<std::size_t>(chunk) * chunk_elements_);
}

// ---- the link

void State::fill(pb::WorkRequest& message) const {
    pb::Tag& tag = *message.mutable_tag();
    tag.set_run_id(configuration_.run_id());
    tag.set_term(std::get<0>(work_));
    tag.set_step(std::get<1>(work_));
    tag.set_kind(static_cast<pb::WorkKind>(std::get<2>(work_)));
    tag.set_weights_version(version_);
    if (!message.has_hello()) return;
    pb::Hello& hello = *message.mutable_hello();
    hello.set_protocol_version(kProtocolVersion);
    hello.set_sphere_id(id_);
    hello.set_task_fingerprint(configuration_.task_fingerprint());
    hello.set_data_fingerprint(configuration_.data_fingerprint());
    hello.set_holds_weights(weights_.complete);
    hello.set_weights_version(std::max<std::int64_t>(0, weights_.version));
    hello.set_weights_digest(weights_.digest);
    hello.set_weights_chunks_held(weights_.complete ? 0 : weights_.arrived);
    hello.set_weights_term(weights_.term);
    hello.set_capacity(able_ ? 1 : 0);
    hello.set_leaving(leaving_);
    std::vector<bool> all(static_cast<std::size_t>(total()));
    for (const auto& [block, _] : held_) std::fill(all.begin() + block.lo, all.begin() + block.hi, true);
    if (unit_) std::fill(all.begin() + unit_->block.lo, all.begin() + unit_->block.hi, true);
    for (const Block& block : decompose(all, top())) set(hello.add_held(), block);
}

void State::relinked(std::int64_t session, double now) {
    session_ = session;
    void_owed();
    attempt_ = 0;
    tick(now);
    drop_up(&pb::WorkRequest::has_ready);
    if (failure_) tell_failure();  // the link before may have ended with it
}

void State::on_response(const pb::WorkResponse& message, double now) {
    const pb::Tag& tag = message.tag();
    if (tag.run_id() != configuration_.run_id())
        throw LinkFault("WrongRunError", "a message of run '" + tag.run_id() + "'; this is run '" + configuration_.run_id() + "'");
    const Work work{tag.term(), tag.step(), tag.kind()};
    if (work < work_) {
        ++refused_["stale"];
        return;
    }
    if (work > work_ && !message.has_weights_header())
        throw LinkFault("ProtocolError", "a message of step " + std::to_string(tag.step()) + " came before its header");
    if (message.has_weights_header()) on_header(work, message, now);
    if (message.has_begin()) on_begin(message.begin());
    if (message.has_assign() && !message.has_weights_header()) {
        const pb::Assign& assign = message.assign();
        if (assign.attempt() != attempt_ || attempt_ == 0 || assigned_) {
            ++refused_["stale"];  // it has crossed a newer attempt
        } else {
            if (assign.from_chunk() < from_chunk_ || assign.from_chunk() > chunks())
                throw LinkFault("ProtocolError", "an assignment from chunk " + std::to_string(assign.from_chunk()));
            const std::vector<Block> blocks = checked(assign);
            from_chunk_ = assign.from_chunk();
            take(blocks);
        }
    }
    if (message.has_weights_chunk()) on_chunk(message.weights_chunk());
    if (message.has_weights_reference())
        throw LinkFault("DecodeError", "weights by reference; this worker said that it takes none");
    if (message.has_weights_footer()) on_footer(message.weights_footer(), now);
    if (message.has_credit()) {
        if (message.credit().attempt() != attempt_ || !assigned_)
            ++refused_["stale"];
        else
            allowed_ = std::max(allowed_, message.credit().through_chunk());
    }
}

void State::on_header(const Work& work, const pb::WorkResponse& message, double now) {
    const pb::WeightsHeader& header = message.weights_header();
    const std::int64_t version = message.tag().weights_version();
    if (const int kind = std::get<2>(work); kind != pb::WORK_KIND_TRAIN && kind != pb::WORK_KIND_EVALUATE)
        throw LinkFault("ProtocolError", "work of kind " + std::to_string(kind) + " is not known here");
    if (header.manifest_digest() != configuration_.manifest().digest())
        throw LinkFault("ProtocolError", "weights of another layout");
    auto& w = weights_;
    if (!header.held_digest().empty()) {
        if (!w.complete || w.version != version || w.digest != header.held_digest())
            throw LinkFault("ProtocolError", "the parent takes version " + std::to_string(version) + " as held");
    } else {
        if (header.from_chunk() == 0) {
            w.arrived = 0;
            weights_began_ = now;
            // What still computes on the version before goes on reading it (N14).
            if (w.flat.use_count() > 1) w.flat = std::make_shared<Buffer>(size_);
        } else if (w.term != std::get<0>(work) || w.version != version || w.arrived != header.from_chunk()) {
            throw LinkFault("DecodeError", "weights go on at chunk " + std::to_string(header.from_chunk()) + "; held are " +
                                               std::to_string(w.arrived) + " of version " + std::to_string(w.version));
        }
        w.version = version;
        w.complete = false;
        w.digest.clear();
    }
    w.term = std::get<0>(work);
    version_ = version;
    if (work > work_) begin_step(work, now);
    if (!message.has_assign()) return;
    const std::vector<Block> blocks = checked(message.assign());
    void_owed();
    attempt_ = from_chunk_ = 0;
    take(blocks);
}

void State::begin_step(const Work& work, double now) {
    work_ = work;
    if (unit_) unit_->cancelled = true;
    unit_.reset();
    held_.clear();
    void_owed();
    attempt_ = from_chunk_ = 0;
    drop_up(&pb::WorkRequest::has_ready);
    phases_.clear();
    step_began_ = now;
}

void State::void_owed() {
    owed_.clear();
    slots_.clear();
    queue_.clear();
    assigned_ = stuck_ = false;
    allowed_ = -1;
}

void State::on_begin(const pb::Begin& begin) {
    if (begin.attempt() <= attempt_)
        throw LinkFault("StaleError", "begin of attempt " + std::to_string(begin.attempt()) + "; attempt " +
                                          std::to_string(attempt_) + " is running");
    if (begin.from_chunk() < 0 || begin.from_chunk() > chunks())
        throw LinkFault("ProtocolError", "begin from chunk " + std::to_string(begin.from_chunk()));
    void_owed();
    attempt_ = begin.attempt();
    from_chunk_ = begin.from_chunk();
    tell_ready();
}

std::vector<Block> State::checked(const pb::Assign& assign) const {
    std::vector<Block> blocks;
    for (const pb::Block& block : assign.blocks()) blocks.push_back({block.lo(), block.hi()});
    std::sort(blocks.begin(), blocks.end());
    for (std::size_t n = 0; n < blocks.size(); ++n) {
        if (!is_canonical(blocks[n], total()))
            throw LinkFault("ProtocolError", blocks[n].text() + " is no canonical block of " + std::to_string(total()) + " microbatches");
        if (n > 0 && blocks[n - 1].hi > blocks[n].lo)
            throw LinkFault("ProtocolError", "assigned blocks " + blocks[n - 1].text() + " and " + blocks[n].text() + " overlap");
    }
    return blocks;
}

// These blocks are owed. What is held or in compute wholly inside of one is used, the largest first (N9); the rest of
// each is to be computed, in its maximal canonical blocks.
void State::take(const std::vector<Block>& blocks) {
    assigned_ = true;
    allowed_ = from_chunk_ + configuration_.window_chunks() - 1;
    std::vector<bool> rest(static_cast<std::size_t>(total()));
    for (const Block& block : blocks) {
        owed_[block] = from_chunk_;
        std::fill(rest.begin() + block.lo, rest.begin() + block.hi, true);
    }
    if (from_chunk_ >= chunks()) return;  // everything of it has been sent before
    std::vector<Block> offers;
    for (const auto& [block, _] : held_) offers.push_back(block);
    if (unit_) offers.push_back(unit_->block);
    std::stable_sort(offers.begin(), offers.end(), [](const Block& a, const Block& b) { return a.width() > b.width(); });
    for (const Block& offer : offers) {
        const auto from = rest.begin() + offer.lo, to = rest.begin() + offer.hi;
        if (std::find(from, to, false) != to) continue;
        if (std::none_of(blocks.begin(), blocks.end(), [&](const Block& b) { return b.contains(offer); })) continue;
        std::fill(from, to, false);
        slots_.insert(offer);
    }
    for (const Block& block : blocks)
        for (const Block& part : decompose(rest, block)) queue_.push_back(part);
    slots_.insert(queue_.begin(), queue_.end());
    stuck_ = !queue_.empty() && !able_;
}

void State::on_chunk(const pb::Chunk& chunk) {
    auto& w = weights_;
    const std::size_t first = static_cast<std::size_t>(w.arrived) * chunk_elements_;
    if (w.complete || w.arrived >= chunk_count_ || chunk.index() != w.arrived ||
        chunk.offset_bytes() != static_cast<std::int64_t>(4 * first) ||
        chunk.data().size() != elements(w.arrived) * static_cast<std::size_t>(weights_dtype_))
        throw LinkFault("DecodeError", "weights chunk " + std::to_string(chunk.index()) + " at byte " +
                                           std::to_string(chunk.offset_bytes()) + " with " + std::to_string(chunk.data().size()) +
                                           " bytes; expected chunk " + std::to_string(w.arrived) + " of " + std::to_string(chunk_count_));
    const std::uint32_t crc = crc32c(chunk.data().data(), chunk.data().size());
    if (crc != chunk.crc32c())
        throw LinkFault("ChecksumError", "weights chunk " + std::to_string(chunk.index()) + " does not fit its checksum");
    from_wire(weights_dtype_, chunk.data(), w.flat->data() + first);
    w.checksums[static_cast<std::size_t>(w.arrived++)] = crc;
}

void State::on_footer(const pb::WeightsFooter& footer, double now) {
    auto& w = weights_;
    if (w.arrived != chunk_count_)
        throw LinkFault("DecodeError", "weights end after " + std::to_string(w.arrived) + " of " + std::to_string(chunk_count_) + " chunks");
    if (version_digest(configuration_.manifest().digest(), w.checksums) != footer.digest()) {
        w.arrived = 0;  // none of it can be gone on from
        throw LinkFault("ChecksumError", "the weights' digest is not the footer's");
    }
    w.digest = footer.digest();
    w.complete = true;
    spend("send_down", now - weights_began_);
}

// ---- what goes up

std::optional<pb::WorkRequest> State::next_up(double now) {
    if (!up_.empty()) {
        pb::WorkRequest message = std::move(up_.front());
        up_.pop_front();
        fill(message);
        message.set_session(session_);
        return message;
    }
    if (!weights_.complete) return std::nullopt;  // there is no digest to send along yet
    // Chunk by chunk across all blocks: the lowest index first, and among equals the lower block (N6).
    const Block* next = nullptr;
    for (const auto& [block, index] : owed_)
        if (index < chunks() && index <= allowed_ && (!next || index < owed_[*next]) && has(block)) next = &block;
    if (!next) return std::nullopt;
    return frame(*next, owed_[*next], now);
}

pb::WorkRequest State::frame(const Block& block, int index, double now) {
    pb::WorkRequest message;
    fill(message);
    message.set_session(session_);
    message.set_attempt(attempt_);
    const bool none = absent(block), last = none || index == chunks() - 1;
    if (none || index == from_chunk_) write_header(block, *message.mutable_gradient_header());
    if (last) write_footer(block, *message.mutable_gradient_footer(), now);
    owed_[block] = last ? chunks() : index + 1;
    if (!none) {
        pb::Chunk& chunk = *message.mutable_gradient_chunk();
        set(chunk.mutable_block(), block);
        chunk.set_index(index);
        if (train()) {
            const std::size_t first = static_cast<std::size_t>(index) * chunk_elements_;
            Buffer sum(elements(index));
            collect(block, first, sum.size(), sum.data());
            chunk.set_offset_bytes(static_cast<std::int64_t>(4 * first));
            chunk.set_data(to_wire(gradient_dtype_, sum.data(), sum.size()));
            chunk.set_crc32c(crc32c(chunk.data().data(), chunk.data().size()));
        }
    }
    // Where a step of very many parts makes a message too large: first what verdicts say beyond which microbatch it is,
    // then the checksums of contributions.
    if (message.ByteSizeLong() > kMostMessageBytes - kAroundChunk) {
        for (pb::NonFinite& skipped : *message.mutable_gradient_header()->mutable_skipped()) {
            const int microbatch = skipped.microbatch();
            skipped.Clear();
            skipped.set_microbatch(microbatch);
        }
        if (message.ByteSizeLong() > kMostMessageBytes - kAroundChunk)
            for (pb::Contribution& part : *message.mutable_gradient_footer()->mutable_contributions()) part.clear_crc32c();
    }
    return message;
}

void State::went_up(const pb::WorkRequest& message, double seconds) {
    if (message.has_gradient_header() || message.has_gradient_chunk()) spend("send_up", seconds);
    sent_bytes_ += static_cast<std::int64_t>(message.gradient_chunk().data().size());
}

void State::write_header(const Block& block, pb::GradientHeader& header) const {
    set(header.mutable_block(), block);
    header.set_weights_digest(weights_.digest);
    header.set_absent(absent(block));
    if (const std::optional<Sums> total = sums(block)) {
        header.set_samples_count(total->count);
        header.set_loss_sum(total->loss);
        for (const auto& [name, value] : total->metrics) {
            pb::MetricSum& metric = *header.add_metrics();
            metric.set_name(name);
            metric.set_value(value);
        }
    }
    std::vector<Skipped> skipped;
    add_skipped(block, skipped);
    for (const Skipped& verdict : skipped) {
        pb::NonFinite& said = *header.add_skipped();
        said.set_microbatch(verdict.microbatch);
        if (header.skipped_size() > kMostDetailed) continue;
        said.set_sphere_id(id_);
        *said.mutable_tensors() = {verdict.tensors.begin(), verdict.tensors.end()};
        *said.mutable_sample_ids() = {verdict.samples.begin(), verdict.samples.end()};
    }
}

void State::write_footer(const Block& block, pb::GradientFooter& footer, double now) {
    set(footer.mutable_block(), block);
    for (const Block& slot : slots_) {
        if (!block.contains(slot)) continue;
        pb::Contribution& part = *footer.add_contributions();
        set(part.mutable_block(), slot);
        part.set_sphere_id(id_);
        part.set_crc32c(held_.at(slot).crc);
    }
    // Times are those of the step, not of the block: they go with the last block, so that they are counted once.
    if (std::count_if(owed_.begin(), owed_.end(), [&](const auto& owed) { return owed.second < chunks(); }) > 1) return;
    double busy = 0;
    for (const auto& [phase, seconds] : phases_) busy += phase == "wait" ? 0 : seconds;
    spend("wait", std::max(0.0, now - step_began_ - busy) - phases_["wait"]);
    for (const auto& [phase, seconds] : phases_) {
        pb::PhaseTime& time = *footer.add_phases();
        time.set_phase(phase);
        time.set_sum_seconds(seconds);
        time.set_max_seconds(seconds);
        time.set_slowest_sphere_id(id_);
    }
}

// Whether all of an owed block, or of a part of it, is computed.
bool State::has(const Block& block) const {
    if (slots_.count(block)) return held_.count(block) > 0;
    if (block.width() == 1) return false;
    const auto [left, right] = halves(block);
    return has(left) && has(right);
}

bool State::absent(const Block& block) const { return !sums(block); }

std::optional<Sums> State::sums(const Block& block) const {
    if (slots_.count(block)) return held_.at(block).sums;
    const auto [left_part, right_part] = halves(block);
    std::optional<Sums> left = sums(left_part), right = sums(right_part);
    if (!left || !right) return left ? left : right;
    left->add(*right);
    return left;
}

void State::add_skipped(const Block& block, std::vector<Skipped>& into) const {
    if (slots_.count(block)) {
        const std::vector<Skipped>& skipped = held_.at(block).skipped;
        into.insert(into.end(), skipped.begin(), skipped.end());
        return;
    }
    const auto [left, right] = halves(block);
    add_skipped(left, into);
    add_skipped(right, into);
}

// Writes these elements of a block's gradient: left + right at every node. False, and nothing written, where it is absent.
bool State::collect(const Block& block, std::size_t first, std::size_t count, float* out) const {
    if (slots_.count(block)) {
        const Held& held = held_.at(block);
        if (held.gradient) std::copy_n(held.gradient->begin() + static_cast<std::ptrdiff_t>(first), count, out);
        return held.gradient != nullptr;
    }
    const auto [left, right] = halves(block);
    if (!collect(left, first, count, out)) return collect(right, first, count, out);
    Buffer other(count);
    if (collect(right, first, count, other.data())) add(gradient_dtype_, out, other.data(), count);
    return true;
}

void State::tell_ready() {
    pb::WorkRequest message;
    message.set_attempt(attempt_);
    pb::Ready& ready = *message.mutable_ready();
    std::vector<bool> all(static_cast<std::size_t>(total()));
    for (const auto& [block, _] : held_) std::fill(all.begin() + block.lo, all.begin() + block.hi, true);
    for (const Block& block : decompose(all, top())) set(ready.add_held(), block);
    if (unit_) set(ready.add_computing(), unit_->block);
    ready.set_idle(able_ && !unit_);
    drop_up(&pb::WorkRequest::has_ready);
    queue(std::move(message));
}

void State::tell_failure() {
    pb::WorkRequest message;
    *message.mutable_task_failure() = *failure_;
    drop_up(&pb::WorkRequest::has_task_failure);
    queue(std::move(message));
}

void State::tell_capacity() {
    pb::WorkRequest message;
    message.mutable_capacity()->set_capacity(able_ ? 1 : 0);
    drop_up(&pb::WorkRequest::has_capacity);
    queue(std::move(message));
}

// What has not left yet and is replaced, or of the past.
void State::drop_up(bool (pb::WorkRequest::*has)() const) {
    up_.erase(std::remove_if(up_.begin(), up_.end(), [has](const pb::WorkRequest& m) { return (m.*has)(); }), up_.end());
}

// ---- the compute thread

std::shared_ptr<Unit> State::next_unit() {
    if (unit_ || queue_.empty() || !weights_.complete || !able_) return nullptr;
    unit_ = std::make_shared<Unit>();
    unit_->block = queue_.front();
    unit_->step = std::get<1>(work_);
    unit_->train = train();
    unit_->weights = weights_.flat;
    queue_.pop_front();
    return unit_;
}

void State::computed(const std::shared_ptr<Unit>& unit, double now) {
    unit->weights.reset();
    if (unit != unit_) return;  // its step is over
    unit_.reset();
    microbatches_ += unit->microbatches;
    samples_ += unit->samples;
    spend("compute", unit->seconds);
    if (unit->held) {
        held_.emplace(unit->block, std::move(*unit->held));
        return;
    }
    if (!unit->failure) return;
    // An exception is no death: what is owed is computed once more elsewhere, and this worker rests for a while.
    ++failures_;
    pb::TaskFailure& said = failure_.emplace();
    said.set_failures_count(failures_);
    said.set_sphere_id(id_);
    said.set_microbatch(unit->failure->microbatch);
    said.set_error(unit->failure->error);
    said.set_traceback(unit->failure->error);
    *said.mutable_sample_ids() = {unit->failure->samples.begin(), unit->failure->samples.end()};
    said.set_invalid_gradient(unit->failure->invalid);
    said.set_step(unit->step);
    tell_failure();
    able_ = false;
    aside_until_ = now + std::min(kAside * std::pow(2, failures_ - 1), kLongestAside);
    queue_.clear();
    tell_capacity();
    stuck_ = std::any_of(slots_.begin(), slots_.end(), [this](const Block& slot) { return !held_.count(slot); });
}

void State::tick(double now) {
    if (able_ || now < aside_until_) return;
    able_ = true;
    failure_.reset();
    tell_capacity();
}

// ---- the end

void State::leave(const std::string& reason) {
    if (leaving_) return;
    leaving_ = true;
    pb::WorkRequest message;
    message.mutable_leaving()->set_reason(reason);
    queue(std::move(message));
}

bool State::owes() const {
    return std::any_of(owed_.begin(), owed_.end(), [this](const auto& owed) { return owed.second < chunks(); });
}

void State::cancel() {
    if (unit_) unit_->cancelled = true;
}

void State::spend(const std::string& phase, double seconds) {
    phases_[phase] += seconds;
    phases_in_all_[phase] += seconds;
}

void State::fill(pb::SphereReport& report) const {
    report.set_sphere_id(id_);
    report.set_weights_version(std::max<std::int64_t>(0, weights_.version));
    report.set_weights_digest(weights_.digest);
    report.set_microbatches_count(microbatches_);
    report.set_samples_count(samples_);
    report.mutable_phase_seconds()->insert(phases_in_all_.begin(), phases_in_all_.end());
    report.set_sent_up_bytes(sent_bytes_);
    report.mutable_refused_counts()->insert(refused_.begin(), refused_.end());
    const std::string step = " of step " + std::to_string(std::get<1>(work_));
    if (unit_)
        report.set_activity("computing " + unit_->block.text() + step);
    else if (!able_)
        report.set_activity("set aside: its task has failed " + std::to_string(failures_) + " times");
    else if (!weights_.complete)
        report.set_activity("receiving weights");
    else
        report.set_activity(owes() ? "sending the blocks" + step : "done");
}

}  // namespace armillary
