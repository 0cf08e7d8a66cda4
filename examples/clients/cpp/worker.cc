#include "worker.h"

#include <gnu/libc-version.h>
#include <grpcpp/grpcpp.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <ctime>
#include <fstream>
#include <random>
#include <thread>

#include "spheres/v1/control.grpc.pb.h"
#include "spheres/v1/work.grpc.pb.h"

namespace armillary {

namespace {

constexpr char kVersion[] = "1";          // raise it where the bits of a gradient change
constexpr double kDial = 5, kWelcome = 20, kEnroll = 10;
constexpr double kPause = 0.05, kLongestPause = 1;
constexpr double kTick = 0.1;             // the longest wait of the caller's thread
constexpr double kLastStatus = 1;         // for the status of a stream that has ended
constexpr std::size_t kMostLines = 1000, kMostLineBytes = 256 * 1024;

std::atomic<int> told_signal{0};

double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

std::chrono::system_clock::time_point in(double seconds) {
    return std::chrono::system_clock::now() + std::chrono::microseconds(static_cast<std::int64_t>(seconds * 1e6));
}

double seconds(const google::protobuf::Duration& duration) {
    return static_cast<double>(duration.seconds()) + duration.nanos() / 1e9;
}

std::string agent() { return "c++17 gcc " + std::to_string(__GNUC__); }

// One connection per stream, so that heartbeats do not wait behind chunks, and pings that notice a dead peer.
std::shared_ptr<grpc::Channel> make_channel(const std::string& address) {
    grpc::ChannelArguments arguments;
    arguments.SetMaxReceiveMessageSize(kMostMessageBytes);
    arguments.SetMaxSendMessageSize(kMostMessageBytes);
    arguments.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, 10'000);
    arguments.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 30'000);
    arguments.SetInt(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
    arguments.SetInt(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
    arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
    arguments.SetInt(GRPC_ARG_ENABLE_RETRIES, 0);
    arguments.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);  // one of the environment is for the web
    return grpc::CreateCustomChannel(address, grpc::InsecureChannelCredentials(), arguments);
}

// The error's name in a status, "" where the other side does not say it.
std::string name_of(const grpc::Status& status) {
    const std::string& details = status.error_message();
    const std::size_t colon = details.find(": ");
    const std::string name = colon == std::string::npos ? "" : details.substr(0, colon);
    return name.size() > 5 && name.compare(name.size() - 5, 5, "Error") == 0 ? name : "";
}

}  // namespace

// One Work stream and what belongs to it; guarded by the worker's lock but for the streams themselves.
struct Worker::Link {
    using Stream = grpc::ClientReaderWriter<pb::WorkRequest, pb::WorkResponse>;

    pb::Ancestor to;
    std::int64_t session = 0;
    double began = now();
    grpc::ClientContext context;
    grpc::ClientContext* beat_context = nullptr;
    std::unique_ptr<Stream> stream;
    bool open = false;      // the parent has answered hello
    bool over = false;      // this side has ended it, or has seen its end
    bool finished = false;  // the status is there
    std::string reason;     // why this side has ended it
    grpc::Status status;
};

// Thrown where no other attempt at this place cures it; `anew`: another enrolment does.
struct Worker::Refusal {
    bool anew;
    std::string sentence;
};

Worker::Worker(Options options) : options_(std::move(options)), host_([] {
    char name[256] = "";
    gethostname(name, sizeof name - 1);
    return std::string(name);
}()) {}

Worker::~Worker() = default;

void Worker::drain(int signal) noexcept {
    if (told_signal.exchange(signal) != 0) _exit(signal == SIGINT ? 130 : 0);  // a second one ends at once
}

int Worker::told() noexcept { return told_signal; }

// On the caller's thread, with no link: whether to dial nobody any more.
bool Worker::stopped() const { return stop_ || (!linked_ && (told() || (state_ && state_->leaving()))); }

void Worker::run() {
    while (!stopped()) {
        try {
            take_part();
        } catch (const Refusal& refusal) {
            if (!refusal.anew) throw Exit(5, refusal.sentence);
            log("enrolling anew: " + refusal.sentence);
        }
    }
}

// Asks control for a place, patiently: control may be about to start.
pb::EnrollSphereResponse Worker::enroll() {
    std::random_device random;
    pb::EnrollSphereRequest request;
    request.set_protocol_version(kProtocolVersion);
    for (int n = 0; n < 4; ++n) request.set_request_id(request.request_id() + std::to_string(random()));
    request.set_host(host_);
    request.set_pid(getpid());
    request.set_agent(agent());
    const double deadline = now() + options_.orphan_timeout;
    log("looking for control at " + options_.control);
    for (double wait = kPause;; wait = std::min(2.0, 2 * wait)) {
        const auto stub = pb::ControlService::NewStub(make_channel(options_.control));
        grpc::ClientContext context;
        context.set_deadline(in(kEnroll));
        pb::EnrollSphereResponse response;
        const grpc::Status status = stub->EnrollSphere(&context, request, &response);
        if (status.ok()) return response;
        if (status.error_code() == grpc::StatusCode::UNIMPLEMENTED)
            throw Exit(5, "what listens at " + options_.control + " is no control");
        if (status.error_code() != grpc::StatusCode::UNAVAILABLE && status.error_code() != grpc::StatusCode::DEADLINE_EXCEEDED)
            throw Exit(5, "control refuses: " + status.error_message());
        if (now() + wait > deadline)
            throw Exit(5, "control at " + options_.control + " does not answer: " + status.error_message() +
                              "; is it running, and is the address right?");
        if (!pause(wait)) throw Exit(0, "told to go before control had answered");
    }
}

// One incarnation. Throws Refusal where its place is another's, or the run does not want it.
void Worker::take_part() {
    place_ = enroll();
    const pb::SphereConfiguration& run = place_.configuration();
    if (run.wire() == pb::WIRE_SHM)
        throw Exit(5, "the run was started with --wire shm, and this worker sends its payload in messages; start it with --wire auto");
    if (run.task() != "digits")
        throw TaskError("task " + run.task() + " is not known here; this worker computes digits only");
    if (place_.path_ids_size() < 1 || place_.path_ids_size() != place_.path_addresses_size() ||
        place_.path_ids_size() != place_.path_incarnations_size())
        throw Exit(1, "control's answer has no way to a parent");
    const Digits task({run.task_options().begin(), run.task_options().end()}, run.manifest(), options_.data);
    if (task.train_size() != run.train_size() || task.test_size() != run.test_size())
        throw TaskError(options_.data + " has other samples than control's data; copy the same file here");
    try {
        state_ = std::make_unique<State>(run, place_.sphere_id());
    } catch (const LinkFault& fault) {
        throw Exit(1, std::string("control's answer: ") + fault.what());
    }
    patience_ = std::max(0.1, seconds(run.patience()));
    ancestors_.clear();
    for (int n = 0; n < place_.path_ids_size(); ++n) {
        pb::Ancestor& ancestor = ancestors_.emplace_back();
        ancestor.set_id(place_.path_ids(n));
        ancestor.set_address(n == 0 ? options_.control : place_.path_addresses(n));  // the address that works from here
        ancestor.set_incarnation(place_.path_incarnations(n));
    }
    session_ = 0;
    alone_ = true;
    alone_since_ = ticked_ = now();
    log(place_.sphere_id() + " joins " + ancestors_.back().id() + " (incarnation " + std::to_string(place_.incarnation()) + ")");

    const Computer computer(run.manifest(), task, state_->sampler(), run.evaluation_microbatches_count(),
                            state_->gradient_dtype(), run.skips_nonfinite());
    computing_ = true;
    std::thread thread([&] { compute(computer); });
    const auto finish = [&] {
        {
            const std::lock_guard lock(mutex_);
            computing_ = false;
            state_->cancel();
        }
        changed_.notify_all();
        thread.join();
    };
    try {
        for (double wait = 0; !stopped(); wait = std::clamp(2 * wait, kPause, kLongestPause)) {
            for (const pb::Ancestor& ancestor : in_order()) {
                const double began = now();
                if (stopped()) break;
                if (!link(ancestor)) continue;
                if (now() - began > kLongestPause) wait = 0;  // who ends every link at once is not dialled at full speed
                break;
            }
            if (stopped()) break;
            if (now() - alone_since_ > options_.orphan_timeout)
                throw Exit(5, "no way to control for so long (--orphan-timeout); the last attempt: " + last_error_);
            pause(wait);
        }
    } catch (...) {
        finish();
        throw;
    }
    finish();
}

// Whom to dial: the nearest first, but a parent that has gone silent last.
std::vector<pb::Ancestor> Worker::in_order() {
    std::vector<pb::Ancestor> order(ancestors_.rbegin(), ancestors_.rend());
    std::stable_partition(order.begin(), order.end(), [this](const pb::Ancestor& a) { return a.id() != silent_; });
    silent_.clear();
    return order;
}

// Waits; false where this process was told to go meanwhile.
bool Worker::pause(double wait) {
    for (const double until = now() + wait; now() < until && !told();) {
        std::unique_lock lock(mutex_);
        changed_.wait_for(lock, std::chrono::duration<double>(std::min(kTick, wait)));
        ticked_ = now();
    }
    return !told();
}

// Dials an ancestor and works for it until the link ends; false where there was none.
bool Worker::link(const pb::Ancestor& to) {
    const std::shared_ptr<grpc::Channel> channel = make_channel(to.address());
    grpc_connectivity_state state;
    for (const double until = now() + kDial; (state = channel->GetState(true)) != GRPC_CHANNEL_READY;) {
        ticked_ = now();
        if (state == GRPC_CHANNEL_TRANSIENT_FAILURE || ticked_ > until || told()) {
            last_error_ = "nobody answers at " + to.address();
            return false;
        }
        channel->WaitForStateChange(state, in(kTick));
    }
    const auto stub = pb::SphereService::NewStub(channel);
    Link link;
    link.to = to;
    link.session = ++session_;
    ticked_ = now();
    link.stream = stub->Work(&link.context);
    std::thread threads[] = {std::thread([&] { read(link); }), std::thread([&] { write(link); }), std::thread([&] { beat(link); })};
    watch(link);
    for (std::thread& thread : threads) thread.join();

    linked_ = false;
    if (!alone_) alone_since_ = now();
    alone_ = true;
    if (link.reason.empty()) link.reason = link.status.ok() ? "it ended the link" : link.status.error_message();
    last_error_ = to.id() + ": " + link.reason;
    log("the link to " + to.id() + " has ended: " + link.reason);
    judge(link);
    return link.open;
}

// The table of status codes. What does not end the process is cured by dialling on.
void Worker::judge(const Link& link) const {
    // At another address than control's another run may have moved in, or another process.
    if (link.open || link.to.id() != ancestors_.front().id()) return;
    const std::string name = name_of(link.status);
    if (name == "StaleError" || link.status.error_code() == grpc::StatusCode::ABORTED)
        throw Refusal{true, link.status.error_message()};
    if (name == "VersionMismatchError" || name == "FingerprintError" || link.status.error_code() == grpc::StatusCode::NOT_FOUND)
        throw Refusal{false, "control refuses: " + link.status.error_message()};
}

// Looks at the clock until the link is over, and sees to it that its threads end.
void Worker::watch(Link& link) {
    const double wait = std::min(kTick, patience_ / 16);
    std::unique_lock lock(mutex_);
    while (!link.over) {
        changed_.wait_for(lock, std::chrono::duration<double>(wait));
        const double gap = now() - ticked_;
        ticked_ = now();
        // Who was stopped cannot know what others have decided meanwhile: all its links are over (N10).
        if (gap > patience_) end(link, "this process was stopped for longer than --patience");
        if (!link.open && ticked_ - link.began > kWelcome) end(link, "it did not answer hello");
        // Who was not attentive itself judges nobody: what has come may wait unread.
        if (link.open && gap < 3 * patience_ / 16 + kTick && ticked_ - heard_ > patience_) {
            silent_ = link.to.id();
            end(link, "it gave no sign of life (--patience)");
        }
        if (told() && !link.open) end(link, "told to go");
        if (told() && !state_->leaving()) start_leaving("a signal");
        if (state_->leaving()) {
            if (state_->owes()) leave_by_ = ticked_ + patience_;
            if (state_->may_leave() || ticked_ > leave_by_) stop_ = true;
        }
        if (stop_) end(link, "this worker goes");
        state_->tick(ticked_);
        if (state_->stuck()) end(link, "the task has failed here, and blocks are owed");
        changed_.notify_all();
    }
    // Where the other side has ended it, its status is on the way; this side's end needs none.
    if (link.reason.empty())
        changed_.wait_for(lock, std::chrono::duration<double>(kLastStatus), [&] { return link.finished; });
    if (!link.finished) link.context.TryCancel();
    if (link.beat_context) link.beat_context->TryCancel();
}

// With the lock held: this side ends the link.
void Worker::end(Link& link, const std::string& reason) {
    if (link.over) return;
    link.over = true;
    link.reason = reason;
    changed_.notify_all();
}

// With the lock held: something came from the parent. Throws where this process was away.
void Worker::hear(Link& link) {
    heard_ = now();
    if (heard_ - ticked_ > patience_) end(link, "this process was stopped for longer than --patience");
}

void Worker::read(Link& link) {
    pb::WorkResponse message;
    while (link.stream->Read(&message)) {
        const std::lock_guard lock(mutex_);
        if (!link.over) hear(link);
        if (link.over) break;  // what came with the word that ends the link is of the past too
        try {
            if (message.has_welcome())
                welcome(link, message);
            else if (!link.open)
                throw LinkFault("ProtocolError", "the answer to hello was no welcome");
            else if (message.has_directive())
                handle(link, message.directive());
            else
                state_->on_response(message, heard_);
        } catch (const LinkFault& fault) {
            state_->count_refused(fault.name);
            end(link, fault.name + ": " + fault.what());
        }
        changed_.notify_all();
    }
    {
        const std::lock_guard lock(mutex_);
        link.over = true;
        changed_.notify_all();
    }
    const grpc::Status status = link.stream->Finish();
    const std::lock_guard lock(mutex_);
    link.status = status;
    link.finished = true;
    changed_.notify_all();
}

void Worker::welcome(Link& link, const pb::WorkResponse& message) {
    std::vector<pb::Ancestor> path(message.welcome().path().begin(), message.welcome().path().end());
    if (path.empty() || path.back().id() != link.to.id())
        throw LinkFault("RefusedError", "the welcome came from " + (path.empty() ? "nobody" : path.back().id()));
    for (pb::Ancestor& node : path) {
        if (node.id() == place_.sphere_id()) throw LinkFault("RefusedError", "the link would close a circle (N11)");
        for (const pb::Ancestor& known : ancestors_)  // the address that worked is kept
            if (known.id() == node.id() && !known.address().empty()) node.set_address(known.address());
    }
    ancestors_ = std::move(path);
    if (link.open) return;  // the parent itself has a new parent
    link.open = linked_ = true;
    alone_ = false;
    state_->relinked(link.session, heard_);
    log("linked to " + link.to.id() + ", session " + std::to_string(link.session));
}

void Worker::write(Link& link) {
    pb::WorkRequest message;
    std::unique_lock lock(mutex_);
    pb::Hello& hello = *message.mutable_hello();
    state_->fill(message);
    message.set_session(link.session);
    hello.set_incarnation(place_.incarnation());
    hello.set_parent_id(link.to.id());
    hello.set_parent_incarnation(link.to.incarnation());
    hello.set_environment_fingerprint(environment());
    *hello.mutable_member() = member();
    for (bool is_hello = true; !link.over; is_hello = false) {
        if (!is_hello) {
            std::optional<pb::WorkRequest> next;
            if (link.open && now() - ticked_ <= patience_) next = state_->next_up(now());
            if (!next) {
                changed_.wait_for(lock, std::chrono::duration<double>(kTick));
                continue;
            }
            message = std::move(*next);
        }
        lock.unlock();
        const double began = now();
        const bool sent = link.stream->Write(message);
        const double took = now() - began;
        lock.lock();
        if (!sent) break;  // the reader sees the end of the stream too, and why
        state_->went_up(message, took);
    }
}

// Signs of life, on a stream and a connection of their own; its end alone does not end the link.
void Worker::beat(Link& link) {
    const double interval = std::max(0.05, seconds(place_.configuration().heartbeat_interval()));
    std::unique_lock lock(mutex_);
    const auto rest = [&](double wait) {
        changed_.wait_for(lock, std::chrono::duration<double>(wait), [&] { return link.over; });
    };
    changed_.wait(lock, [&] { return link.over || link.open; });
    const auto stub = pb::SphereService::NewStub(make_channel(link.to.address()));
    while (!link.over) {
        grpc::ClientContext context;
        link.beat_context = &context;
        lock.unlock();
        const auto stream = stub->Heartbeat(&context);
        lock.lock();
        while (!link.over) {
            pb::HeartbeatRequest request;
            request.set_run_id(place_.configuration().run_id());
            request.set_sphere_id(place_.sphere_id());
            request.set_incarnation(place_.incarnation());
            request.set_session(link.session);
            *request.add_reports() = report();
            request.set_sent_nanos(static_cast<std::int64_t>(now() * 1e9));
            lock.unlock();
            pb::HeartbeatResponse answer;
            const bool heard = stream->Write(request) && stream->Read(&answer);
            lock.lock();
            if (!heard || link.over) break;
            hear(link);
            // A parent without a way to control: this worker has none either, since then.
            alone_ = answer.alone_seconds() > 0;
            if (alone_) alone_since_ = heard_ - answer.alone_seconds();
            rest(interval);
        }
        link.beat_context = nullptr;
        lock.unlock();
        context.TryCancel();
        stream->Finish();
        lock.lock();
        rest(interval);
    }
}

void Worker::compute(const Computer& computer) {
    std::unique_lock lock(mutex_);
    while (computing_) {
        const std::shared_ptr<Unit> unit = state_->next_unit();
        if (!unit) {
            changed_.wait(lock);
            continue;
        }
        lock.unlock();
        computer.compute(*unit);
        lock.lock();
        if (unit->failure) log("error: " + unit->failure->error);
        state_->computed(unit, now());
        changed_.notify_all();
    }
}

// ---- directives, and what is said of this worker; with the lock held

void Worker::handle(Link& link, const pb::Directive& directive) {
    if (!directive.target_sphere_id().empty() && directive.target_sphere_id() != place_.sphere_id()) return;
    pb::WorkRequest answer;
    switch (directive.kind()) {
        case pb::DIRECTIVE_KIND_STOP:
            log("told to stop: " + directive.reason());
            stop_ = true;
            break;
        case pb::DIRECTIVE_KIND_DRAIN:
            start_leaving(directive.reason());
            break;
        case pb::DIRECTIVE_KIND_MOVE:
            if (directive.parent().id() == place_.sphere_id() || directive.parent().id() == link.to.id()) break;
            ancestors_.push_back(directive.parent());
            end(link, "moving to " + directive.parent().id());
            break;
        case pb::DIRECTIVE_KIND_REPORT_STATE:
            answer.mutable_state_report()->set_request_id(directive.request_id());
            *answer.mutable_state_report()->mutable_report() = report();
            state_->queue(answer);
            break;
        case pb::DIRECTIVE_KIND_REPORT_LOG:
            *answer.mutable_log_report() = last_lines(directive.lines());
            answer.mutable_log_report()->set_request_id(directive.request_id());
            answer.mutable_log_report()->set_sphere_id(place_.sphere_id());
            state_->queue(answer);
            break;
        default:
            log("directive " + std::to_string(directive.kind()) + " is not known here");
    }
}

void Worker::start_leaving(const std::string& reason) {
    if (state_->leaving()) return;
    log("leaving: " + reason);
    state_->leave(reason);
    leave_by_ = now() + patience_;
}

// Gradients have equal bits among equal ones: what may change them here.
std::string Worker::environment() const {
    std::string text = std::string("c++ worker ") + kVersion + "\n" + __VERSION__ + "\nglibc " + gnu_get_libc_version();
#if defined(__x86_64__)
    // exp and log of the C library are other code where the processor has fused multiply-add
    text += __builtin_cpu_supports("fma") ? "\nx86_64 fma" : "\nx86_64";
#elif defined(__aarch64__)
    text += "\naarch64";
#else
    text += "\nother";
#endif
    return hex(sha256(text)).substr(0, 16);
}

pb::Member Worker::member() const {
    pb::Member member;
    member.set_host(host_);
    member.set_pid(getpid());
    member.set_environment_fingerprint(environment());
    member.set_agent(agent());
    return member;
}

pb::SphereReport Worker::report() const {
    pb::SphereReport report;
    state_->fill(report);
    report.set_incarnation(place_.incarnation());
    report.set_parent_id(ancestors_.back().id());
    report.set_role("leaf");
    report.set_host(host_);
    report.set_pid(getpid());
    report.set_wire("inline");
    std::ifstream status("/proc/self/status");
    for (std::string key, rest; status >> key && std::getline(status, rest);) {
        if (key == "VmRSS:") report.set_resident_bytes(std::atoll(rest.c_str()) * 1024);
        if (key == "VmHWM:") report.set_peak_resident_bytes(std::atoll(rest.c_str()) * 1024);
    }
    return report;
}

void Worker::log(const std::string& line) {
    std::timespec clock{};
    std::timespec_get(&clock, TIME_UTC);
    std::tm local{};
    char day[32], stamp[40];
    std::strftime(day, sizeof day, "%F %T", localtime_r(&clock.tv_sec, &local));
    std::snprintf(stamp, sizeof stamp, "%s,%03d ", day, static_cast<int>(clock.tv_nsec / 1'000'000));
    const std::lock_guard lock(log_mutex_);
    lines_.push_back(stamp + line);
    if (lines_.size() > kMostLines) lines_.pop_front();
    std::fprintf(stderr, "%s\n", lines_.back().c_str());
}

pb::LogReport Worker::last_lines(int most) {
    const std::lock_guard lock(log_mutex_);
    auto from = lines_.end();
    for (std::size_t room = kMostLineBytes; from != lines_.begin() && most-- > 0;) {
        const std::size_t size = std::prev(from)->size() + 4;
        if (size > room) break;
        room -= size;
        --from;
    }
    pb::LogReport report;
    *report.mutable_lines() = {from, lines_.end()};
    return report;
}

}  // namespace armillary
