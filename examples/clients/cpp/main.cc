// The command line. Exit codes are those of `sphere --help`.
#include <unistd.h>

#include <climits>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <string>

#include "vectors.h"
#include "worker.h"

namespace {

constexpr char kUsage[] =
    "usage: worker --control HOST:PORT [--data FILE] [--orphan-timeout TIME]\n"
    "       worker --vectors DIR\n"
    "\n"
    "  --control HOST:PORT    address of control (default: ARMILLARY_CONTROL)\n"
    "  --data FILE            the digits (default: spheres/tasks/data/digits.csv.gz of this project)\n"
    "  --orphan-timeout TIME  end after so long without control, such as 500ms, 60s, 5m (60s)\n"
    "  --vectors DIR          check this program against the golden vectors, protos/testdata\n"
    "\n"
    "SIGTERM and Ctrl+C: finish the step, then leave; a second one ends at once.\n"
    "exit codes: 0 the run is over, or told to go; 1 any other error; 2 wrong flags; 3 the task cannot be loaded or its\n"
    "data are missing; 5 control or the run refused, or nobody answered for --orphan-timeout; 130 Ctrl+C\n";

[[noreturn]] void wrong(const std::string& sentence) {
    std::fprintf(stderr, "error: %s; see `worker --help`\n", sentence.c_str());
    std::exit(2);
}

double duration(const std::string& text) {
    char* unit = nullptr;
    const double value = std::strtod(text.c_str(), &unit);
    const std::string name = unit;
    const double factor = name == "ms" ? 0.001 : name == "m" ? 60 : name == "h" ? 3600 : name.empty() || name == "s" ? 1 : -1;
    if (unit == text.c_str() || factor < 0 || !(value >= 0)) wrong("--orphan-timeout " + text + ": give a duration such as 60s or 5m");
    return value * factor;
}

std::string address(const std::string& text) {
    const std::size_t colon = text.rfind(':');
    const std::string port = colon == std::string::npos ? "" : text.substr(colon + 1);
    if (colon == 0 || port.empty() || port.size() > 5 || port.find_first_not_of("0123456789") != std::string::npos || std::stoi(port) > 65535)
        wrong("'" + text + "' is no address; give HOST:PORT, such as 127.0.0.1:5000");
    return text;
}

// build/worker lies four folders below the project.
std::string default_data() {
    char path[PATH_MAX] = "";
    if (readlink("/proc/self/exe", path, sizeof path - 1) < 0) return "digits.csv.gz";
    std::string folder = path;
    for (int n = 0; n < 5; ++n) folder.resize(std::max<std::size_t>(folder.rfind('/') + 1, 1) - 1);
    return folder + "/spheres/tasks/data/digits.csv.gz";
}

}  // namespace

int main(int count, char** words) {
    armillary::Options options;
    std::string vectors;
    if (const char* control = std::getenv("ARMILLARY_CONTROL")) options.control = control;
    for (int n = 1; n < count; n += 2) {
        const std::string flag = words[n];
        if (flag == "--help" || flag == "-h") {
            std::fputs(kUsage, stdout);
            return 0;
        }
        if (flag != "--control" && flag != "--data" && flag != "--orphan-timeout" && flag != "--vectors") wrong("no flag " + flag);
        if (n + 1 == count) wrong(flag + " needs a value");
        const std::string value = words[n + 1];
        if (flag == "--control") options.control = value;
        if (flag == "--data") options.data = value;
        if (flag == "--orphan-timeout") options.orphan_timeout = duration(value);
        if (flag == "--vectors") vectors = value;
    }
    try {
        if (!vectors.empty()) return armillary::check_vectors(vectors) ? 0 : 1;
        if (options.control.empty()) wrong("--control HOST:PORT is missing");
        address(options.control);
        if (options.data.empty()) options.data = default_data();
        std::signal(SIGPIPE, SIG_IGN);
        for (const int signal : {SIGTERM, SIGINT}) {
            struct sigaction action {};
            action.sa_handler = armillary::Worker::drain;
            action.sa_flags = SA_RESTART;
            sigaction(signal, &action, nullptr);
        }
        armillary::Worker(options).run();
    } catch (const armillary::Exit& exit) {
        if (exit.code != 0) std::fprintf(stderr, "error: %s\n", exit.what());
        if (exit.code != 0) return exit.code;
    } catch (const armillary::TaskError& error) {
        std::fprintf(stderr, "error: %s\n", error.what());
        return 3;
    } catch (const std::exception& error) {
        std::fprintf(stderr, "error: %s\n", error.what());
        return 1;
    }
    return armillary::Worker::told() == SIGINT ? 130 : 0;
}
