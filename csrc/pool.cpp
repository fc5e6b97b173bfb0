#include "pool.h"

#include <sched.h>

#include <algorithm>

namespace bandcrop {

Batch::Batch(Request what)
    : request(std::move(what)), replaced(request.samples), errors(request.samples) {
    again_.reserve(request.samples);
}

Status Worker::fill(Batch& batch, Job& job) {
    const Request& request = batch.request;
    std::int64_t& replaced = batch.replaced[job.index];
    replaced = 0;
    job.bytes_read = 0;
    const Wait wait = job.wait;
    Wait next = Wait::for_pixels;
    Status outcome;
    for (std::size_t first = 0, end = 0; first < request.channels; first = end) {
        job.path = request.path_of(job.index, first);
        const std::string& path = request.paths[job.path];
        while (end < request.channels && request.paths[request.path_of(job.index, end)] == path)
            ++end;
        job.wait = wait;
        Status status = image(request, job, first, end - first, replaced);
        if (status.code == Status::failed) return status;
        // Of a sample of several files, ask for all that are not there before giving up.
        if (!status.ok()) {
            next = std::min(next, job.wait);
            outcome = std::move(status);
        }
    }
    job.wait = next;
    return outcome;
}

Status Worker::image(const Request& request, Job& job, std::size_t first_channel,
                     std::size_t channels, std::int64_t& replaced) {
    File file;
    if (Status status = file.open(request.paths[job.path].c_str()); !status.ok()) return status;
    const std::size_t first = job.index * request.channels + first_channel;
    const std::int64_t* bands = request.bands.data() + first;

    file.cached_only = job.wait == Wait::for_nothing;
    Status status = parse(file, header_, false, layout_);
    if (status.ok()) {
        if (!request.bands_in_file.empty() && request.bands_in_file[job.path] != layout_.bands)
            return Status::failure("has " + std::to_string(layout_.bands) + " bands, not " +
                                   std::to_string(request.bands_in_file[job.path]) +
                                   " (tag 277, SamplesPerPixel)");
        for (std::size_t c = 0; c < channels; ++c)
            if (bands[c] >= layout_.bands)
                return Status::failure("tag 277 (SamplesPerPixel) is " +
                                       std::to_string(layout_.bands) + ", but band " +
                                       std::to_string(bands[c]) + " was asked for (0-based)");
        if (!layout_.nodata && request.nodata)
            layout_.nodata = nodata_sample(*request.nodata, layout_);
        double window[4] = {0, 0, 1, 1};
        if (!request.windows.empty())
            std::copy_n(request.windows.data() + job.index * 4, 4, window);
        const unsigned orient = request.orient.empty() ? 0 : request.orient[job.index];
        const bool transposes = (orient & 4) != 0;
        const auto rows = static_cast<std::uint32_t>(transposes ? request.width : request.height);
        const auto columns =
            static_cast<std::uint32_t>(transposes ? request.height : request.width);
        if (window[2] * layout_.height > longest_window ||
            window[3] * layout_.width > longest_window)
            return Status::failure(
                "tag 256 or 257: the image is " + std::to_string(layout_.height) + " x " +
                std::to_string(layout_.width) + " pixels, of a window at most " +
                std::to_string(static_cast<int>(longest_window)) + " a side are resampled");
        down_.set(window[0] * layout_.height, (window[0] + window[2]) * layout_.height,
                  layout_.height, rows);
        across_.set(window[1] * layout_.width, (window[1] + window[3]) * layout_.width,
                    layout_.width, columns);
        status = region_.plan(file, header_, layout_,
                              {down_.low, down_.high, across_.low, across_.high}, bands, channels);
    }
    if (status.code == Status::not_cached) {
        file.will_need(0, 4096);
        job.wait = Wait::for_headers;
    }
    if (!status.ok()) return status;
    file.cached_only = job.wait != Wait::for_pixels;
    status = region_.read(file);
    if (status.ok()) status = pixels(request, job.index, first, channels, replaced);
    if (status.code == Status::not_cached) {
        for (const Region::Range& range : region_.ranges())
            file.will_need(range.offset, range.length);
        job.wait = Wait::for_pixels;
    }
    if (status.ok())
        for (const Region::Range& range : region_.ranges()) job.bytes_read += range.length;
    return status;
}

// Converts and resamples what region_ planned into channels `first` on of all the batch's channels.
Status Worker::pixels(const Request& request, std::size_t index, std::size_t first,
                      std::size_t channels, std::int64_t& replaced) {
    if (normalise_.size() < channels) {  // the last to grow, should memory run out
        resamplers_.resize(channels);
        normalise_.resize(channels);
    }
    const std::size_t plane = request.height * request.width;
    for (std::size_t c = 0; c < channels; ++c) {
        const std::size_t at = request.statistics_by_band
                                   ? static_cast<std::size_t>(request.bands[first + c])
                                   : first + c;
        normalise_[c] = {};
        if (!request.mean.empty()) normalise_[c].mean = request.mean[at];
        if (!request.std.empty()) normalise_[c].std = request.std[at];
        normalise_[c].divide = !request.std.empty() && down_.copies && across_.copies;
        resamplers_[c].begin(down_, across_, request.orient.empty() ? 0 : request.orient[index],
                             request.out + (first + c) * plane);
    }
    for (std::uint32_t y = down_.low, rows = 0; y < down_.high; y += rows) {
        rows = std::min({down_.high - y, region_.rows_at_hand(y),
                         static_cast<std::uint32_t>(resamplers_[0].space())});
        for (std::size_t c = 0; c < channels; ++c) {
            std::ptrdiff_t step;
            float* const to = resamplers_[c].rows(step);
            if (Status status = region_.floats(c, y, rows, normalise_[c], to, step, replaced);
                !status.ok())
                return status;
            resamplers_[c].push(rows);
        }
    }
    for (std::size_t c = 0; c < channels; ++c) resamplers_[c].finish();
    return {};
}

Pool::~Pool() {
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        stopping_ = true;
    }
    work_to_do_.notify_all();
    for (std::thread& thread : threads_) thread.join();
}

bool Pool::finished(const Batch& batch) {
    return batch.running_ == 0 && (batch.cancelled_ || batch.done_ == batch.request.samples);
}

bool Pool::claim(Batch& batch, Job& job) {
    if (batch.cancelled_) return false;
    if (batch.next_ < batch.request.samples) {
        job = {};
        job.index = batch.next_++;
    } else if (!batch.again_.empty()) {
        job = batch.again_.front();
        batch.again_.erase(batch.again_.begin());
    } else {
        return false;
    }
    ++batch.running_;
    return true;
}

// Runs one job with the lock released. Throws nothing: a pool's thread has nobody to catch it.
void Pool::run(std::unique_ptr<Worker>& worker, Batch& batch, Job job,
               std::unique_lock<std::mutex>& lock) {
    // After a failure only samples before it matter: one of them may fail too.
    const bool matters = !(batch.request.stop_at_failure && job.index > batch.first_failed_);
    Status status;
    if (matters) {
        lock.unlock();
        try {
            if (!worker) worker = std::make_unique<Worker>();
            status = worker->fill(batch, job);
        } catch (const std::exception&) {  // std::bad_alloc or, of absurd sizes, std::length_error
            status.code = Status::failed;
            status.message = "out of memory";  // so short that it needs none
        }
        if (status.code == Status::failed) {
            const std::size_t size =
                batch.request.channels * batch.request.height * batch.request.width;
            std::fill_n(batch.request.out + job.index * size, size, 0.0f);
            batch.replaced[job.index] = 0;
        }
        lock.lock();
    }
    --batch.running_;
    if (status.code == Status::not_cached) {
        batch.again_.push_back(job);
        work_to_do_.notify_one();
    } else {
        ++batch.done_;
        batch.bytes_read += job.bytes_read;
        if (!status.ok()) {
            batch.errors[job.index] = {std::move(status.message), job.path};
            batch.first_failed_ = std::min(batch.first_failed_, job.index);
        }
    }
    if (finished(batch)) progress_.notify_all();
}

void Pool::serve() {
    std::unique_ptr<Worker> worker;  // made by the first job
    std::unique_lock<std::mutex> lock(mutex_);
    while (!stopping_) {
        std::shared_ptr<Batch> batch;
        Job job;
        for (const auto& candidate : queue_)
            if (claim(*candidate, job)) {
                batch = candidate;
                break;
            }
        if (!batch) {
            work_to_do_.wait(lock);
            continue;
        }
        run(worker, *batch, job, lock);
        if (finished(*batch))
            queue_.erase(std::remove(queue_.begin(), queue_.end(), batch), queue_.end());
    }
}

void Pool::submit(std::shared_ptr<Batch> batch) {
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        // Threads first: where they cannot be had this throws, and the batch must not be queued.
        while (threads_.size() < threads_wanted_) threads_.emplace_back([this] { serve(); });
        if (batch->request.samples > 0) queue_.push_back(std::move(batch));
    }
    work_to_do_.notify_all();
}

bool Pool::work(Batch& batch, std::chrono::milliseconds how_long) {
    const auto end = std::chrono::steady_clock::now() + how_long;
    std::unique_lock<std::mutex> lock(mutex_);
    std::unique_ptr<Worker> worker;
    if (!idle_.empty()) {
        worker = std::move(idle_.back());
        idle_.pop_back();
    }
    Job job;
    while (std::chrono::steady_clock::now() < end && claim(batch, job))
        run(worker, batch, job, lock);
    if (worker) idle_.push_back(std::move(worker));
    return finished(batch);
}

bool Pool::wait(const Batch& batch, std::chrono::milliseconds how_long) {
    std::unique_lock<std::mutex> lock(mutex_);
    return progress_.wait_for(lock, how_long, [&] { return finished(batch); });
}

void Pool::cancel(Batch& batch) {
    std::unique_lock<std::mutex> lock(mutex_);
    batch.cancelled_ = true;
    progress_.wait(lock, [&] { return batch.running_ == 0; });
    queue_.erase(std::remove_if(queue_.begin(), queue_.end(),
                                [&](const auto& queued) { return queued.get() == &batch; }),
                 queue_.end());
}

unsigned usable_processors() {
    cpu_set_t set;
    if (::sched_getaffinity(0, sizeof set, &set) == 0) {
        const int count = CPU_COUNT(&set);
        if (count > 0) return static_cast<unsigned>(count);
    }
    return std::max(1u, std::thread::hardware_concurrency());
}

}  // namespace bandcrop
