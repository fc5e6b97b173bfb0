// pool: threads that fill batches of samples.
//
// Promises
// - Results depend on the request alone, never on the number of threads or their order.
// - A batch's cold files are asked of the kernel together, before any of them is waited for; cached
//   ones are read at once.
// - Every public function may be called from any thread. cancel() and ~Pool return only when no job
//   writes to a batch's output any more.
// - Each thread keeps its buffers from sample to sample: nothing is allocated once they are large
//   enough.
// - A thread that finds no memory fails its sample and goes on. In the caller's thread
//   std::bad_alloc or std::system_error (no thread to be had) leaves no batch behind.
//
// Does not: know Python. Threads are started by the first submit(), not before.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "decode.h"
#include "resample.h"
#include "tiff.h"

namespace bandcrop {

// What to fill: samples x channels x height x width floats at `out`.
struct Request {
    float* out = nullptr;
    std::size_t samples = 0, channels = 0, height = 0, width = 0;
    std::vector<std::string> paths;  // one for each sample or, with file_per_band, for each channel
    bool file_per_band = false;
    std::vector<std::uint32_t> bands_in_file;  // of each path; empty: any number
    std::optional<std::string> nodata;         // of files without such a tag
    std::vector<std::int64_t> bands;           // [samples][channels]
    std::vector<double> windows;       // [samples][4]: top, left, height, width; empty: all of it
    std::vector<std::uint8_t> orient;  // [samples]; empty: 0
    std::vector<float> mean, std;      // by band, or [samples][channels]; empty: 0 and 1
    bool statistics_by_band = false;
    bool stop_at_failure = true;  // samples after a failed one need not be filled

    std::size_t path_of(std::size_t sample, std::size_t channel) const {  // index in `paths`
        return file_per_band ? sample * channels + channel : sample;
    }
};

// What an attempt at a sample may wait for. One that needs more asks the kernel for it and returns
// not_cached: by the next attempt the bytes are there.
enum class Wait { for_nothing, for_headers, for_pixels };

// One sample of a batch, and how far it has come.
struct Job {
    std::size_t index = 0;
    Wait wait = Wait::for_nothing;
    std::size_t path = 0;  // in Request::paths: the file being read, at fault should this fail
    std::uint64_t bytes_read = 0;
};

// A request under way and, once done, its outcome.
struct Batch {
    explicit Batch(Request what);
    const Request request;
    // Of each sample: samples of the files that became the mean.
    std::vector<std::int64_t> replaced;
    struct Error {
        std::string message;  // empty: the sample is filled
        std::size_t path;     // in request.paths: the file at fault
    };
    std::vector<Error> errors;  // of each sample
    std::uint64_t bytes_read = 0;

  private:
    friend class Pool;
    // All guarded by the pool's mutex.
    std::size_t next_ = 0, running_ = 0, done_ = 0, first_failed_ = SIZE_MAX;
    // Samples whose bytes are on their way from the disk; has room for all.
    std::vector<Job> again_;
    bool cancelled_ = false;
};

// One thread's files and buffers.
class Worker {
  public:
    // Fills one sample, or fails. not_cached: call again later, with the job as it is left.
    Status fill(Batch& batch, Job& job);

  private:
    Status image(const Request& request, Job& job, std::size_t first_channel, std::size_t channels,
                 std::int64_t& replaced);
    Status pixels(const Request& request, std::size_t index, std::size_t first,
                  std::size_t channels, std::int64_t& replaced);

    Header header_;
    Layout layout_;
    Region region_;
    Axis down_, across_;
    std::vector<Resampler> resamplers_;
    std::vector<Normalise> normalise_;
};

class Pool {
  public:
    explicit Pool(unsigned threads) : threads_wanted_(threads) {}
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;
    ~Pool();
    unsigned threads() const { return threads_wanted_; }

    void submit(std::shared_ptr<Batch> batch);
    // Fills some of a batch that was not submitted in the calling thread, for about that long.
    // True when it is done.
    bool work(Batch& batch, std::chrono::milliseconds how_long);
    // Waits for a batch, at most that long. True when it is done.
    bool wait(const Batch& batch, std::chrono::milliseconds how_long);
    // Lets jobs that run end, and starts no more.
    void cancel(Batch& batch);

  private:
    static bool claim(Batch& batch, Job& job);
    void run(std::unique_ptr<Worker>& worker, Batch& batch, Job job,
             std::unique_lock<std::mutex>& lock);
    void serve();
    static bool finished(const Batch& batch);

    const unsigned threads_wanted_;
    std::mutex mutex_;
    std::condition_variable work_to_do_, progress_;
    std::deque<std::shared_ptr<Batch>> queue_;
    std::vector<std::unique_ptr<Worker>> idle_;  // of calling threads
    std::vector<std::thread> threads_;
    bool stopping_ = false;
};

unsigned usable_processors();

}  // namespace bandcrop
