// Everything that threads may do to a Pool at once, for ThreadSanitizer (see tests/test_attack.py):
//     g++ -std=c++17 -O1 -g -fsanitize=thread -Icsrc tests/race_pool.cpp
//         csrc/{tiff,decode,resample,pool}.cpp -o race_pool && ./race_pool FILE...
// Batches overlap, come from several threads, fail, are cancelled and dropped; the results are
// those of one thread. Then each allocation in turn fails.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <system_error>
#include <thread>

#include "pool.h"

using namespace bandcrop;

namespace {

std::atomic<long> countdown{-1};  // of allocations: those at 1 and 0 fail; negative: none does

constexpr std::size_t samples = 24, side = 24;
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

std::vector<std::string> messages(const Batch& batch) {
    std::vector<std::string> all;
    for (const Batch::Error& error : batch.errors) all.push_back(error.message);
    return all;
}

void require(bool holds, const char* what) {
    if (holds) return;
    std::fprintf(stderr, "broken: %s\n", what);
    std::exit(1);
}

// One batch with allocations n and n + 1 failing, whoever makes them. False: there were fewer.
bool survives(const std::vector<std::string>& paths, const Batch& alone,
              const std::vector<float>& expected, long n) {
    std::vector<float> out;
    Request what = request(paths, out, 0);
    Pool pool(2);
    countdown = n + 1;
    try {
        const auto batch = std::make_shared<Batch>(std::move(what));
        pool.submit(batch);
        while (!pool.wait(*batch, a_while)) {
        }
        for (std::size_t i = 0; i < samples; ++i) {
            const std::string& message = batch->errors[i].message;
            const auto first = static_cast<std::ptrdiff_t>(i * side * side);
            const bool equal = std::equal(out.begin() + first, out.begin() + first + side * side,
                                          expected.begin() + first);
            require(message == "out of memory" || (message == alone.errors[i].message && equal),
                    "a sample is filled or has an error");
        }
    } catch (const std::bad_alloc&) {
    } catch (const std::system_error&) {
    }
    return countdown.exchange(-1) < 1;
}

}  // namespace

void* operator new(std::size_t size) {
    if (countdown >= 0 && countdown-- < 2) throw std::bad_alloc();
    if (void* const memory = std::malloc(size)) return memory;
    throw std::bad_alloc();
}
void operator delete(void* memory) noexcept {
    std::free(memory);
}
void operator delete(void* memory, std::size_t) noexcept {
    std::free(memory);
}

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
            require(messages(here) == messages(alone) && messages(*batch) == messages(alone),
                    "the errors");
            require(here.bytes_read == alone.bytes_read, "the bytes read");
        };
        std::vector<std::thread> customers;
        for (unsigned turn = 0; turn < 3; ++turn) customers.emplace_back(customer, turn);
        for (std::thread& thread : customers) thread.join();
        pool.submit(std::make_shared<Batch>(request(paths, left, 0)));
    }  // a pool may go while a batch is under way
    long failures = 0;
    while (survives(paths, alone, expected, failures)) ++failures;
    require(failures > 20, "many allocations failed");
    std::printf("clean\n");
}
