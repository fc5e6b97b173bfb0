// Fuzz target: the bytes of a file through tiff, decode and resample. No Python, no threads.
//
// libFuzzer (CORPUS: a folder of small TIFF files: python tests/test_attack.py seeds CORPUS):
//     clang++ -std=c++17 -O2 -g -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all
//         -DBANDCROP_LIBDEFLATE -DBANDCROP_ZSTD -Icsrc -o fuzz_reader tests/fuzz_reader.cpp
//         csrc/tiff.cpp csrc/decode.cpp csrc/resample.cpp -ldeflate -lzstd
//     ./fuzz_reader -max_len=4096 -timeout=1 -malloc_limit_mb=512 CORPUS
// A seeded mutation loop of its own, any compiler (the test suite runs it under both sanitizers):
//     g++ (the same, without "fuzzer," and with -DSEEDED_LOOP)
//     ./fuzz_reader SEED EXECUTIONS FILE...
//
// Beside the sanitizers' checks, it aborts when
// - buffers kept from file to file change a result (stale pixels),
// - a part of an image fails or differs where the whole can be read,
// - whole numbers resample to something that is not finite.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "decode.h"
#include "resample.h"
#include "tiff.h"

namespace {

using namespace bandcrop;
using Bytes = std::vector<std::uint8_t>;

class Memory final : public Source {
  public:
    Memory(const std::uint8_t* bytes, std::size_t count) : bytes_(bytes) { size_ = count; }
    Status read(std::uint64_t offset, void* to, std::size_t count) override {
        if (count > size_ || offset > size_ - count) return Status::failure("past the end");
        if (count > 0) std::memcpy(to, bytes_ + offset, count);
        return {};
    }

  private:
    const std::uint8_t* bytes_;
};

// What a thread of the pool keeps from file to file.
struct Kept {
    Header header;
    Layout layout;
    Region region;
    Axis down, across;
    Resampler resampler;
};

void require(bool holds, const char* what) {
    if (holds) return;
    std::fprintf(stderr, "broken: %s\n", what);
    std::abort();
}

// The samples of `area`, as bandcrop.read() gets them.
Status samples(Kept& with, Source& source, const Rectangle& area,
               const std::vector<std::int64_t>& bands, Bytes& to) {
    Status status =
        with.region.plan(source, with.header, with.layout, area, bands.data(), bands.size());
    if (status.ok()) status = with.region.read(source);
    if (!status.ok()) return status;
    const std::size_t height = area.bottom - area.top, width = area.right - area.left;
    const std::size_t row = width * with.layout.sample_bytes;
    to.assign(bands.size() * height * row, 0);
    for (std::uint32_t y = area.top, rows = 0; y < area.bottom; y += rows) {
        rows = with.region.rows_at_hand(y);
        for (std::size_t b = 0; b < bands.size(); ++b) {
            status =
                with.region.samples(b, y, rows, to.data() + (b * height + y - area.top) * row, row);
            if (!status.ok()) return status;
        }
    }
    return {};
}

// One channel of one sample, as a worker of the pool makes it.
Status fill(Kept& with, Source& source, const double* window, std::int64_t band,
            const Normalise& how, std::uint32_t height, std::uint32_t width, unsigned orient,
            std::vector<float>& out) {
    const Layout& layout = with.layout;
    const bool transposes = (orient & 4) != 0;
    if (window[2] * layout.height > longest_window || window[3] * layout.width > longest_window)
        return Status::failure("too large a window");
    with.down.set(window[0] * layout.height, (window[0] + window[2]) * layout.height, layout.height,
                  transposes ? width : height);
    with.across.set(window[1] * layout.width, (window[1] + window[3]) * layout.width, layout.width,
                    transposes ? height : width);
    const Rectangle area{with.down.low, with.down.high, with.across.low, with.across.high};
    Status status = with.region.plan(source, with.header, layout, area, &band, 1);
    if (status.ok()) status = with.region.read(source);
    if (!status.ok()) return status;
    // The time that a file may take is its business; here smaller ones find more in the same time.
    if (std::uint64_t{area.bottom - area.top} * (area.right - area.left) > 1u << 18) return {};
    out.assign(std::size_t{height} * width, 0);
    with.resampler.begin(with.down, with.across, orient, out.data());
    std::int64_t replaced = 0;
    for (std::uint32_t y = area.top, rows = 0; y < area.bottom; y += rows) {
        rows = std::min({area.bottom - y, with.region.rows_at_hand(y),
                         static_cast<std::uint32_t>(with.resampler.space())});
        std::ptrdiff_t step;
        float* const to = with.resampler.rows(step);
        status = with.region.floats(0, y, rows, how, to, step, replaced);
        if (!status.ok()) return status;
        with.resampler.push(rows);
    }
    with.resampler.finish();
    require(replaced >= 0 &&
                replaced <= std::int64_t{area.bottom - area.top} * (area.right - area.left),
            "more samples replaced than there are");
    if (layout.kind != Kind::floating)
        for (const float value : out) require(std::isfinite(value), "a float that is not finite");
    return {};
}

// Choices, from the file's last bytes so that a mutation of the file changes them too.
class Choices {
  public:
    Choices(const std::uint8_t* bytes, std::size_t count) {
        for (std::size_t i = count - std::min<std::size_t>(count, 16); i < count; ++i)
            state_ = (state_ ^ bytes[i]) * 0x100000001b3;
    }
    std::uint64_t next() {  // splitmix64
        std::uint64_t x = state_ += 0x9e3779b97f4a7c15;
        x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
        x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
        return x ^ (x >> 31);
    }
    std::uint32_t below(std::uint64_t limit) { return static_cast<std::uint32_t>(next() % limit); }
    double fraction() { return static_cast<double>(next() >> 11) * 0x1p-53; }

  private:
    std::uint64_t state_ = 0xcbf29ce484222325;
};

void attack(const std::uint8_t* bytes, std::size_t count) {
    static Kept kept;
    Memory source(bytes, count);
    if (!parse(source, kept.header, true, kept.layout).ok()) return;
    Kept fresh;
    require(parse(source, fresh.header, true, fresh.layout).ok(), "parse depends on the last file");
    const Layout& layout = fresh.layout;

    Choices choose(bytes, count);
    std::vector<std::int64_t> bands;
    for (std::uint32_t i = 1 + choose.below(3); i > 0; --i)
        bands.push_back(choose.below(layout.bands));

    const Rectangle whole{0, layout.height, 0, layout.width};
    Rectangle part;
    part.top = choose.below(layout.height);
    part.bottom = part.top + 1 + choose.below(layout.height - part.top);
    part.left = choose.below(layout.width);
    part.right = part.left + 1 + choose.below(layout.width - part.left);
    const bool small = std::uint64_t{layout.height} * layout.width <= 1u << 18;
    Bytes all, some;
    const bool whole_reads = small && samples(fresh, source, whole, bands, all).ok();
    if (std::uint64_t{part.bottom - part.top} * (part.right - part.left) <= 1u << 18) {
        const bool part_reads = samples(kept, source, part, bands, some).ok();
        require(part_reads || !whole_reads, "a part fails where the whole can be read");
        if (whole_reads) {
            const std::size_t size = layout.sample_bytes, row = (part.right - part.left) * size;
            const std::uint8_t* at = some.data();
            for (std::size_t b = 0; b < bands.size(); ++b)
                for (std::size_t y = part.top; y < part.bottom; ++y, at += row)
                    require(
                        std::memcmp(at,
                                    all.data() +
                                        ((b * layout.height + y) * layout.width + part.left) * size,
                                    row) == 0,
                        "a part differs from the whole");
        }
    }

    for (int i = 0; i < 2; ++i) {
        double window[4] = {0, 0, 1, 1};
        const std::uint32_t kind = choose.below(4);
        std::uint32_t height = 1 + choose.below(40), width = 1 + choose.below(40);
        for (int axis = 0; axis < 2 && kind > 0; ++axis) {
            window[axis] = choose.fraction();
            window[axis + 2] = choose.fraction() * (1 - window[axis]);
            if (kind == 1) window[axis + 2] *= 1e-9;  // next to nothing, the edge included
            if (kind == 1 && choose.below(2) == 0) window[axis] = 1;
        }
        const unsigned orient = choose.below(8);
        if (kind == 2) {  // whole pixels, copied
            height = std::min(part.bottom - part.top, 1024u);
            width = std::min(part.right - part.left, 1024u);
            window[0] = static_cast<double>(part.top) / layout.height;
            window[1] = static_cast<double>(part.left) / layout.width;
            window[2] = static_cast<double>(height) / layout.height;
            window[3] = static_cast<double>(width) / layout.width;
            if ((orient & 4) != 0) std::swap(height, width);
        }
        Normalise how;
        how.mean = static_cast<float>(choose.fraction() * 100);
        how.std = static_cast<float>(choose.fraction() * 10 + 0.01);
        how.divide = choose.below(2) == 0;
        std::vector<float> a, b;
        const bool one = fill(kept, source, window, bands[0], how, height, width, orient, a).ok();
        const bool two = fill(fresh, source, window, bands[0], how, height, width, orient, b).ok();
        require(one == two, "a failure depends on the last file");
        // memcmp: a NaN from the overflow of huge floats equals itself.
        require(!one || (a.size() == b.size() &&
                         (a.empty() || std::memcmp(a.data(), b.data(), a.size() * 4) == 0)),
                "the result depends on the last file");
    }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* bytes, std::size_t count) {
    attack(bytes, count);
    return 0;
}

#if defined(SEEDED_LOOP)
namespace {

// Numbers that sit on the edges of counts, offsets and sizes.
constexpr std::uint64_t edges[] = {0,
                                   1,
                                   2,
                                   3,
                                   7,
                                   8,
                                   255,
                                   256,
                                   4095,
                                   4096,
                                   4097,
                                   32767,
                                   65535,
                                   65536,
                                   0x7fffffff,
                                   0x80000000,
                                   0xfffffff8,
                                   0xffffffff,
                                   0x7fffffffffffffff,
                                   0x8000000000000000,
                                   0xffffffffffffffff};

void write_number(Bytes& bytes, std::size_t at, unsigned size, std::uint64_t value, bool big) {
    for (unsigned i = 0; i < size && at + i < bytes.size(); ++i)
        bytes[at + i] = static_cast<std::uint8_t>(value >> (8 * (big ? size - 1 - i : i)));
}

// Half of the changes fall on the first directory, where the sizes and offsets are.
void mutate(Bytes& bytes, const std::vector<Bytes>& files, Choices& choose) {
    const bool big = bytes.size() > 8 && bytes[0] == 'M';
    std::size_t directory = 0;
    for (unsigned i = 0; i < 4 && bytes.size() > 8; ++i)
        directory |= std::size_t{bytes[big ? 7 - i : 4 + i]} << (8 * i);
    for (std::uint32_t n = 1 + choose.below(6); n > 0 && !bytes.empty(); --n) {
        std::size_t at = choose.below(bytes.size());
        if (choose.below(2) == 0 && directory < bytes.size())
            at = std::min<std::size_t>(directory + 2 + 4 * choose.below(60), bytes.size() - 1);
        switch (choose.below(8)) {
            case 0: bytes[at] ^= static_cast<std::uint8_t>(1u << choose.below(8)); break;
            case 1: bytes[at] = static_cast<std::uint8_t>(choose.next()); break;
            case 2:
            case 3:
                write_number(bytes, at, 1u << choose.below(4),
                             edges[choose.below(std::size(edges))], big);
                break;
            case 4:  // a little more or less
                bytes[at] = static_cast<std::uint8_t>(bytes[at] + choose.below(9) - 4);
                break;
            case 5: write_number(bytes, at, 4, choose.below(2 * bytes.size()), big); break;
            case 6: bytes.resize(choose.below(4) == 0 ? at : bytes.size()); break;
            default: {  // a piece of another file or of this one
                const Bytes& other = files[choose.below(files.size())];
                if (other.empty()) break;
                const std::size_t from = choose.below(other.size());
                const std::size_t most = std::min(other.size() - from, bytes.size() - at);
                std::copy_n(other.begin() + static_cast<std::ptrdiff_t>(from),
                            choose.below(most) + 1,
                            bytes.begin() + static_cast<std::ptrdiff_t>(at));
            }
        }
    }
}

}  // namespace

int main(int count, char** arguments) {
    if (count < 4) return 2;
    std::vector<Bytes> files;
    for (int i = 3; i < count; ++i) {
        std::FILE* file = std::fopen(arguments[i], "rb");
        if (file == nullptr) return 2;
        Bytes bytes(1 << 20);
        bytes.resize(std::fread(bytes.data(), 1, bytes.size(), file));
        std::fclose(file);
        attack(bytes.data(), bytes.size());
        files.push_back(bytes);
    }
    const std::string seed = arguments[1];
    Choices choose(reinterpret_cast<const std::uint8_t*>(seed.data()), seed.size());
    const long executions = std::atol(arguments[2]);
    for (long i = 0; i < executions; ++i) {
        Bytes bytes = files[choose.below(files.size())];
        mutate(bytes, files, choose);
        bytes.shrink_to_fit();  // so that AddressSanitizer sees the end
        // What makes it abort can be had again: the file and the changes follow from the seed.
        if (const char* keep = std::getenv("KEEP_LAST")) {
            if (std::FILE* file = std::fopen(keep, "wb")) {
                if (!bytes.empty()) std::fwrite(bytes.data(), 1, bytes.size(), file);
                std::fclose(file);
            }
        }
        attack(bytes.data(), bytes.size());
    }
    std::printf("%ld executions\n", executions);
}
#endif
