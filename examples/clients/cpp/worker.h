// The life of a worker: enrolls with control, dials its parent, and keeps a link until the run is over.
//
// Four threads share one State under one lock: reader and writer of the Work stream, the heartbeat, and the compute
// thread. The caller's thread looks at the clock: it alone begins and ends links. Every wait has an end: a condition
// variable that all wake, or a call that is cancelled.
#pragma once

#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "state.h"

namespace armillary {

struct Options {
    std::string control, data;
    double orphan_timeout = 60;
};

// Ends the process, with that code.
struct Exit : std::runtime_error {
    Exit(int exit_code, const std::string& sentence) : std::runtime_error(sentence), code(exit_code) {}
    int code;
};

class Worker {
public:
    explicit Worker(Options options);
    ~Worker();

    // Takes part until the run is over or it is told to go. Throws Exit, TaskError.
    void run();

    // For a signal handler: finish what is owed, then leave.
    static void drain(int signal) noexcept;

    // The signal with which it was told to go, 0 where it was not.
    static int told() noexcept;

private:
    struct Link;
    struct Refusal;

    pb::EnrollSphereResponse enroll();
    void take_part();
    bool link(const pb::Ancestor& to);
    void judge(const Link& link) const;
    void watch(Link& link);
    void read(Link& link);
    void write(Link& link);
    void beat(Link& link);
    void compute(const Computer& computer);

    void welcome(Link& link, const pb::WorkResponse& message);
    void handle(Link& link, const pb::Directive& directive);
    void end(Link& link, const std::string& reason);
    void hear(Link& link);
    void start_leaving(const std::string& reason);
    bool pause(double seconds);

    std::vector<pb::Ancestor> in_order();
    std::string environment() const;
    pb::Member member() const;
    pb::SphereReport report() const;
    void log(const std::string& line);
    pb::LogReport last_lines(int most);
    bool stopped() const;

    const Options options_;
    const std::string host_;

    std::mutex mutex_;  // guards what follows, while there are threads
    std::condition_variable changed_;
    std::unique_ptr<State> state_;
    pb::EnrollSphereResponse place_;
    std::vector<pb::Ancestor> ancestors_;  // the way from control to the parent
    std::int64_t session_ = 0;
    double patience_ = 4, ticked_ = 0, heard_ = 0, alone_since_ = 0, leave_by_ = 0;
    bool alone_ = true, linked_ = false, computing_ = false, stop_ = false;
    std::string silent_, last_error_;

    std::mutex log_mutex_;
    std::deque<std::string> lines_;
};

}  // namespace armillary
