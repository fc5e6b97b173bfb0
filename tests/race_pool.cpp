// Everything that threads may do to a Pool at once, for ThreadSanitizer (see tests/test_attack.py):
//     g++ -std=c++17 -O1 -g -fsanitize=thread -Icsrc tests/race_pool.cpp
//         csrc/{tiff,decode,resample,pool}.cpp -o race_pool && ./race_pool FILE...
// Batches overlap, come from several threads, fail, are cancelled and dropped; the results are
// those of one thread.
#include <cstdio>
#include <cstdlib>
#include <thread>

#include "pool.h"

using namespace bandcrop;

namespace {

constexpr std::size_t samples = 12, side = 24;
constexpr std::chrono::milliseconds a_while{20};

Request request(const std::vector<std::string>& paths, std::vector<float>& out, unsigned turn) {
    out.assign(samples * side * side, -1);
    Request what;
    what.out = out.data();
    what.samples = samples;
    what.channels = 1;
    what.height = what.width = side;
    what.stop_at_failure = turn % 2 == 1;
    for (std::size_t i = 0; i < samples; ++i) {
        what.paths.push_back(paths[i % paths.size()]);
        what.bands.push_back(0);
        what.windows.insert(what.windows.end(), {0.1, 0.03 * static_cast<double>(i), 0.5, 0.6});
        what.orient.push_back(static_cast<std::uint8_t>(i % 8));
    }
    return what;
}

void require(bool holds, const char* what) {
    if (holds) return;
    std::fprintf(stderr, "broken: %s\n", what);
    std::exit(1);
}

}  // namespace

int main(int count, char** arguments) {
    const std::vector<std::string> paths(arguments + 1, arguments + count);
    std::vector<float> expected;
    Batch alone(request(paths, expected, 0));
    Pool one(1);
    while (!one.work(alone, a_while)) {
    }

    for (int round = 0; round < 10; ++round) {
        std::vector<float> left;
        Pool pool(3);
        const auto customer = [&](unsigned turn) {
            std::vector<float> kept, unwanted, own;
            const auto batch = std::make_shared<Batch>(request(paths, kept, 0));
            const auto doomed = std::make_shared<Batch>(request(paths, unwanted, turn));
            pool.submit(batch);
            pool.submit(doomed);
            Batch here(request(paths, own, 0));
            while (!pool.work(here, a_while)) {
            }
            pool.cancel(*doomed);
            unwanted.assign(unwanted.size(), 5);  // nobody else writes here any more
            while (!pool.wait(*batch, a_while)) {
            }
            require(own == expected && kept == expected, "the results of one thread");
            require(here.errors == alone.errors && batch->errors == alone.errors, "the errors");
            require(here.bytes_read == alone.bytes_read, "the bytes read");
        };
        std::vector<std::thread> customers;
        for (unsigned turn = 0; turn < 3; ++turn) customers.emplace_back(customer, turn);
        for (std::thread& thread : customers) thread.join();
        pool.submit(std::make_shared<Batch>(request(paths, left, 0)));
    }  // a pool may go while a batch is under way
    std::printf("clean\n");
}
