// What one incarnation of a worker knows and decides: events in, messages and units out.
//
// No I/O, no threads, no clock: whoever owns it holds a lock around each call and says what time it is. The events are
// those of docs/protocol.md, "A step"; N1 to N22 are its rules.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "compute.h"
#include "spheres/v1/control.pb.h"
#include "spheres/v1/work.pb.h"
#include "wire.h"

namespace armillary {

// The parent broke the protocol: the link must end. `name` is that of the table of status codes.
struct LinkFault : std::runtime_error {
    LinkFault(std::string error, const std::string& sentence) : std::runtime_error(sentence), name(std::move(error)) {}
    std::string name;
};

class State {
public:
    // Throws LinkFault where the configuration does not fit itself.
    State(const pb::SphereConfiguration& configuration, std::string sphere_id);

    Sampler sampler() const;
    Dtype gradient_dtype() const { return gradient_dtype_; }

    // ---- the link

    // Fills tag and hello, but for what only the link knows: whom it means to reach, and who this is.
    void fill(pb::WorkRequest& hello) const;

    // A parent has answered hello: what was owed to the one before is void.
    void relinked(std::int64_t session, double now);

    // A message of the parent that is neither welcome nor directive.
    void on_response(const pb::WorkResponse& message, double now);

    // The next message to send; none where nothing can be sent now.
    std::optional<pb::WorkRequest> next_up(double now);

    // That message has left.
    void went_up(const pb::WorkRequest& message, double seconds);

    // To go up when there is a link: reports.
    void queue(pb::WorkRequest message) { up_.push_back(std::move(message)); }

    // ---- the compute thread

    // The next block to compute; null where there is none, or one is being computed.
    std::shared_ptr<Unit> next_unit();

    void computed(const std::shared_ptr<Unit>& unit, double now);

    // ---- the clock, and the end

    void tick(double now);

    // Whether blocks are owed that nobody here can compute: the link must end, so that others are given them.
    bool stuck() const { return stuck_; }

    void leave(const std::string& reason);
    bool leaving() const { return leaving_; }
    bool owes() const;

    // Whether nobody needs this worker: it owes nothing of the present step, and holds nothing of it.
    bool may_leave() const { return owed_.empty() && held_.empty() && !unit_; }

    void cancel();

    void count_refused(const std::string& reason) { ++refused_[reason]; }

    // What there is to say of the work; the link adds who this is and where.
    void fill(pb::SphereReport& report) const;

private:
    using Work = std::tuple<std::int64_t, std::int64_t, int>;  // term, step, kind: ordered as steps follow each other

    bool train() const { return std::get<2>(work_) == pb::WORK_KIND_TRAIN; }
    int total() const { return train() ? configuration_.microbatches_count() : configuration_.evaluation_microbatches_count(); }
    int chunks() const { return train() ? chunk_count_ : 1; }
    Block top() const { return {0, total()}; }
    std::size_t elements(int chunk) const;

    // what came down
    void on_header(const Work& work, const pb::WorkResponse& message, double now);
    void on_begin(const pb::Begin& begin);
    void on_chunk(const pb::Chunk& chunk);
    void on_footer(const pb::WeightsFooter& footer, double now);
    void begin_step(const Work& work, double now);
    void void_owed();
    std::vector<Block> checked(const pb::Assign& assign) const;
    void take(const std::vector<Block>& blocks);

    // what goes up
    bool has(const Block& block) const;
    bool absent(const Block& block) const;
    std::optional<Sums> sums(const Block& block) const;
    void add_skipped(const Block& block, std::vector<Skipped>& into) const;
    bool collect(const Block& block, std::size_t first, std::size_t count, float* out) const;
    pb::WorkRequest frame(const Block& block, int index, double now);
    void write_header(const Block& block, pb::GradientHeader& header) const;
    void write_footer(const Block& block, pb::GradientFooter& footer, double now);
    void tell_ready();
    void tell_failure();
    void tell_capacity();
    void drop_up(bool (pb::WorkRequest::*has)() const);
    void spend(const std::string& phase, double seconds);

    const pb::SphereConfiguration configuration_;
    const std::string id_;
    std::size_t size_;
    Dtype gradient_dtype_, weights_dtype_;
    std::size_t chunk_elements_;
    int chunk_count_;

    // the present work
    Work work_{0, -1, 0};
    std::int64_t version_ = -1, session_ = 0;
    // held blocks, until the next step's header (N7); the one in compute; those to compute next
    std::map<Block, Held> held_;
    std::shared_ptr<Unit> unit_;
    std::deque<Block> queue_;

    // the attempt: what is owed, with the next chunk of each; the blocks computed here that make it up
    int attempt_ = 0, from_chunk_ = 0, allowed_ = -1;
    bool assigned_ = false, stuck_ = false;
    std::map<Block, int> owed_;
    std::set<Block> slots_;

    // the weights: chunks 0 to arrived - 1 are here; complete once the footer's digest agreed (N17)
    struct {
        std::shared_ptr<Buffer> flat;
        std::int64_t term = 0, version = -1;
        int arrived = 0;
        bool complete = false;
        std::string digest;
        std::vector<std::uint32_t> checksums;
    } weights_;

    std::deque<pb::WorkRequest> up_;
    bool leaving_ = false;

    // after a failure this worker computes nothing for a while, and tells of it again on a new link
    bool able_ = true;
    double aside_until_ = 0;
    int failures_ = 0;
    std::optional<pb::TaskFailure> failure_;

    // for people
    double step_began_ = 0, weights_began_ = 0;
    std::map<std::string, double> phases_, phases_in_all_;
    std::int64_t microbatches_ = 0, samples_ = 0, sent_bytes_ = 0;
    std::map<std::string, std::int64_t> refused_;
};

}  // namespace armillary
