#include "tiff.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cfloat>
#include <charconv>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <system_error>

namespace bandcrop {
namespace {

std::string system_reason(int error) {
    return std::generic_category().message(error);
}

std::uint64_t number(const std::uint8_t* bytes, unsigned size, bool big_endian) {
    std::uint64_t value = 0;
    for (unsigned i = 0; i < size; ++i)
        value |= std::uint64_t{bytes[big_endian ? size - 1 - i : i]} << (8 * i);
    return value;
}

// Bytes of one value of a TIFF field type; 0 for types unknown.
unsigned type_bytes(unsigned type) {
    constexpr unsigned bytes[19] = {0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4, 0, 0, 8, 8, 8};
    return type < 19 ? bytes[type] : 0;
}

bool is_unsigned(unsigned type) {  // BYTE, SHORT, LONG, IFD, LONG8, IFD8
    return type == 1 || type == 3 || type == 4 || type == 13 || type == 16 || type == 18;
}

// The tags that count here: TIFF 6.0's, libtiff's ImageDepth, GeoTIFF's and GDAL's.
enum class Tag : std::uint16_t {
    new_subfile_type = 254,
    image_width = 256,
    image_length = 257,
    bits_per_sample = 258,
    compression = 259,
    photometric = 262,
    fill_order = 266,
    strip_offsets = 273,
    samples_per_pixel = 277,
    rows_per_strip = 278,
    strip_byte_counts = 279,
    planar_configuration = 284,
    predictor = 317,
    tile_width = 322,
    tile_length = 323,
    tile_offsets = 324,
    tile_byte_counts = 325,
    sample_format = 339,
    ycbcr_subsampling = 530,
    image_depth = 32997,
    geo_key_directory = 34735,
    gdal_nodata = 42113
};

constexpr struct Wanted {
    Tag tag;
    const char* name;
} wanted[] = {{Tag::new_subfile_type, "NewSubfileType"},
              {Tag::image_width, "ImageWidth"},
              {Tag::image_length, "ImageLength"},
              {Tag::bits_per_sample, "BitsPerSample"},
              {Tag::compression, "Compression"},
              {Tag::photometric, "PhotometricInterpretation"},
              {Tag::fill_order, "FillOrder"},
              {Tag::strip_offsets, "StripOffsets"},
              {Tag::samples_per_pixel, "SamplesPerPixel"},
              {Tag::rows_per_strip, "RowsPerStrip"},
              {Tag::strip_byte_counts, "StripByteCounts"},
              {Tag::planar_configuration, "PlanarConfiguration"},
              {Tag::predictor, "Predictor"},
              {Tag::tile_width, "TileWidth"},
              {Tag::tile_length, "TileLength"},
              {Tag::tile_offsets, "TileOffsets"},
              {Tag::tile_byte_counts, "TileByteCounts"},
              {Tag::sample_format, "SampleFormat"},
              {Tag::ycbcr_subsampling, "YCbCrSubSampling"},
              {Tag::image_depth, "ImageDepth"},
              {Tag::geo_key_directory, "GeoKeyDirectory"},
              {Tag::gdal_nodata, "GDAL_NODATA"}};

// Where `tag` stands among those wanted; the end if it does not.
std::size_t place(Tag tag) {
    std::size_t at = 0;
    while (at < std::size(wanted) && wanted[at].tag != tag) ++at;
    return at;
}

Status bad_tag(Tag tag, const std::string& what) {
    return Status::failure("tag " + std::to_string(static_cast<unsigned>(tag)) + " (" +
                           wanted[place(tag)].name + ") " + what);
}

// A number as GDAL reads it (CPLAtofM): blanks before it and whatever follows it do not count, the
// decimal sign may be a comma, and text that is none is 0. NaN and infinity also as MSVC has them.
double number_of(std::string text) {
    text.erase(0, text.find_first_not_of(" \t\n\v\f\r"));
    if (text[0] == '+') text.erase(0, 1);
    for (char& c : text)
        if (c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
    if (const std::size_t at = text.find_first_of(".,"); at != std::string::npos) text[at] = '.';
    const std::size_t sign = text[0] == '-';
    const auto begins = [&](const char* word) { return text.rfind(word, sign) == sign; };
    constexpr double infinity = std::numeric_limits<double>::infinity();
    if (begins("1.#inf")) return sign != 0 ? -infinity : infinity;
    if (begins("1.#qnan") || begins("1.#snan") || begins("1.#ind"))
        return std::numeric_limits<double>::quiet_NaN();
    double value = 0;
    const char* const end = text.data() + text.size();
    if (std::from_chars(text.data(), end, value).ec == std::errc::result_out_of_range)
        value = text.find("e-") != std::string::npos ? 0 : sign != 0 ? -infinity : infinity;
    return value;
}

template <class T>
std::uint64_t floating_bits(double value) {
    // GDAL compares with a tolerance. It matters for the largest number, written with seven digits.
    constexpr double most = std::numeric_limits<T>::max();
    if (std::fabs(value) < most && std::fabs(value) > most * (1 - 4 * FLT_EPSILON))
        value = std::copysign(most, value);
    const T sample = static_cast<T>(value);
    std::uint64_t bits = 0;
    std::memcpy(&bits, &sample, sizeof sample);
    return bits;
}

struct Entry {
    unsigned type = 0;
    std::uint64_t count = 0;   // 0 if the directory does not have it
    std::uint64_t offset = 0;  // of the values in the file, wherever they are

    bool present() const { return count != 0; }
};

// The entries of a directory, looked up by tag.
struct Directory {
    Source& source;
    Header& header;
    bool big_endian = false;
    bool big_tiff = false;
    Entry found[std::size(wanted)] = {};
    std::uint64_t end = 0;  // of its entries in the file; there stands where the next one is

    const Entry& operator[](Tag tag) const { return found[place(tag)]; }

    // Reads the file's head: how its numbers are written, and where the first directory is.
    Status start(std::uint64_t& at) {
        const std::uint8_t* bytes = nullptr;
        if (source.size() < 8)
            return Status::failure("not a TIFF file: only " + std::to_string(source.size()) +
                                   " bytes");
        if (Status status = header.view(source, 0, 8, bytes); !status.ok()) return status;
        const bool little = bytes[0] == 'I' && bytes[1] == 'I';
        if (!little && !(bytes[0] == 'M' && bytes[1] == 'M'))
            return Status::failure("not a TIFF file: it does not begin with II or MM");
        big_endian = !little;
        const std::uint64_t version = number(bytes + 2, 2, big_endian);
        if (version != 42 && version != 43)
            return Status::failure("not a TIFF file: version " + std::to_string(version) +
                                   " at byte 2, not 42 or 43");
        big_tiff = version == 43;
        at = number(bytes + 4, 4, big_endian);
        if (big_tiff) {
            if (Status status = header.view(source, 4, 12, bytes); !status.ok()) return status;
            if (number(bytes, 2, big_endian) != 8 || number(bytes + 2, 2, big_endian) != 0)
                return Status::failure("BigTIFF offsets at byte 4 are not of 8 bytes");
            at = number(bytes + 4, 8, big_endian);
        }
        return {};
    }

    Status read(std::uint64_t at) {
        const std::uint8_t* bytes = nullptr;
        const unsigned head = big_tiff ? 8 : 2, size = big_tiff ? 20 : 12, space = offset_bytes();
        if (Status status = header.view(source, at, head, bytes); !status.ok()) return status;
        const std::uint64_t entries = number(bytes, head, big_endian);
        if (entries > 65535)
            return Status::failure("directory at byte " + std::to_string(at) + " claims " +
                                   std::to_string(entries) + " entries");
        if (Status status = header.view(source, at + head, entries * size, bytes); !status.ok())
            return status;
        for (std::uint64_t i = 0; i < entries; ++i) {
            const std::uint8_t* b = bytes + i * size;
            const auto tag = static_cast<Tag>(number(b, 2, big_endian));
            const std::size_t slot = place(tag);
            if (slot == std::size(wanted)) continue;
            Entry& entry = found[slot];
            if (entry.present()) continue;  // of a tag given twice the first counts
            entry.type = static_cast<unsigned>(number(b + 2, 2, big_endian));
            entry.count = number(b + 4, space, big_endian);
            const unsigned each = type_bytes(entry.type);
            if (each == 0)
                return bad_tag(tag, "has the unknown field type " + std::to_string(entry.type));
            if (entry.count == 0) return bad_tag(tag, "has no value");
            // Values that fit stand in the entry itself, others where it points.
            entry.offset = entry.count <= space / each ? at + head + i * size + 4 + space
                                                       : number(b + 4 + space, space, big_endian);
            if (entry.count > source.size() / each ||
                entry.offset > source.size() - entry.count * each)
                return bad_tag(tag,
                               "points past the end of the file: " + std::to_string(entry.count) +
                                   " values at byte " + std::to_string(entry.offset));
        }
        end = at + head + entries * size;
        return {};
    }

    unsigned offset_bytes() const { return big_tiff ? 8 : 4; }

    // Where the next directory is; 0 behind the last one, also where a file ends too early to say.
    Status next(std::uint64_t& at) {
        at = 0;
        if (source.size() - end < offset_bytes()) return {};
        const std::uint8_t* bytes = nullptr;
        if (Status status = header.view(source, end, offset_bytes(), bytes); !status.ok())
            return status;
        at = number(bytes, offset_bytes(), big_endian);
        return {};
    }

    // The value of `tag`, the same for every band where there are several; `otherwise` if absent.
    Status value(Tag tag, std::uint64_t otherwise, std::uint64_t& to, std::uint64_t most = 65535) {
        const Entry& entry = (*this)[tag];
        to = otherwise;
        if (!entry.present()) return {};
        if (!is_unsigned(entry.type)) return bad_tag(tag, "is not of an unsigned integer type");
        const std::uint8_t* bytes = nullptr;
        const unsigned each = type_bytes(entry.type);
        const std::uint64_t count = std::min(entry.count, most);
        if (Status status = header.view(source, entry.offset, count * each, bytes); !status.ok())
            return status;
        to = number(bytes, each, big_endian);
        for (std::uint64_t i = 1; i < count; ++i)
            if (number(bytes + i * each, each, big_endian) != to)
                return bad_tag(tag, "holds different values, which is not supported");
        return {};
    }

    Status array(Tag tag, std::uint64_t needed, TagArray& to) {
        const Entry& entry = (*this)[tag];
        if (!entry.present()) return bad_tag(tag, "is missing");
        if (!is_unsigned(entry.type)) return bad_tag(tag, "is not of an unsigned integer type");
        if (entry.count < needed)
            return bad_tag(tag, "has " + std::to_string(entry.count) + " values, the image needs " +
                                    std::to_string(needed));
        to = {static_cast<std::uint16_t>(tag), entry.offset, entry.count, type_bytes(entry.type)};
        return {};
    }

    // GDAL writes nodata as text.
    Status nodata(const Layout& layout, std::optional<std::uint64_t>& to) {
        const Entry& entry = (*this)[Tag::gdal_nodata];
        to.reset();
        // ASCII; libtiff takes BYTE, SBYTE and UNDEFINED for it
        if (!entry.present() || type_bytes(entry.type) != 1) return {};
        const std::uint8_t* bytes = nullptr;
        const std::uint64_t count = std::min<std::uint64_t>(entry.count, 1024);
        if (Status status = header.view(source, entry.offset, count, bytes); !status.ok())
            return status;
        to = nodata_sample(std::string(bytes, std::find(bytes, bytes + count, 0)), layout);
        return {};
    }

    Status epsg(std::optional<int>& to) {
        const Entry& entry = (*this)[Tag::geo_key_directory];
        to.reset();
        if (!entry.present() || entry.type != 3 || entry.count < 4) return {};
        const std::uint8_t* bytes = nullptr;
        const std::uint64_t count = std::min<std::uint64_t>(entry.count, 4096);
        if (Status status = header.view(source, entry.offset, count * 2, bytes); !status.ok())
            return status;
        bool projected = false;
        std::optional<int> projected_code, geographic_code;
        for (std::uint64_t i = 4; i + 4 <= count; i += 4) {
            const auto key = number(bytes + 2 * i, 2, big_endian);
            const auto location = number(bytes + 2 * i + 2, 2, big_endian);
            const auto code = static_cast<int>(number(bytes + 2 * i + 6, 2, big_endian));
            const bool known = location == 0 && code != 0 && code != 32767;  // 32767: user-defined
            // GTModelType 1 and ProjectedCSType: then GeographicType is only what it is based on.
            if ((key == 1024 && code == 1) || key == 3072) projected = true;
            if (key == 3072 && known) projected_code = code;
            if (key == 2048 && known) geographic_code = code;
        }
        to = projected ? projected_code : geographic_code;
        return {};
    }
};

// Counts the pages of one band and of the first image's size, that one included; masks are none.
// Directories are followed onwards in the file only, as far as they can be read.
Status count_pages(Directory& first, std::uint64_t first_at, const Layout& layout,
                   std::uint64_t& pages) {
    pages = 1;
    std::uint64_t at = 0;
    if (Status status = first.next(at); !status.ok()) return status;
    if (at == first_at) return {};
    for (std::uint64_t end = 8; at >= end;) {
        Directory page{first.source, first.header, first.big_endian, first.big_tiff};
        std::uint64_t type = 0, width = 0, height = 0, bands = 0;
        Status status = page.read(at);
        if (status.ok()) status = page.value(Tag::new_subfile_type, 0, type, 1);
        if (status.ok()) status = page.value(Tag::image_width, 0, width, 1);
        if (status.ok()) status = page.value(Tag::image_length, 0, height, 1);
        if (status.ok()) status = page.value(Tag::samples_per_pixel, 1, bands, 1);
        if (status.ok()) status = page.next(at);
        if (!status.ok()) return status.code == Status::not_cached ? status : Status{};
        const bool is_mask = (type & 4) != 0;
        if (width == layout.width && height == layout.height && bands == 1 && !is_mask) ++pages;
        end = page.end;
    }
    return {};
}

}  // namespace

File::~File() {
    if (descriptor_ >= 0) ::close(descriptor_);
}

Status File::open(const char* path) {
    // O_NONBLOCK: opening a FIFO that nobody writes must not hang.
    descriptor_ = ::open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
    if (descriptor_ < 0) return Status::failure("cannot be opened: " + system_reason(errno));
    struct stat about;
    if (::fstat(descriptor_, &about) != 0)
        return Status::failure("cannot be examined: " + system_reason(errno));
    if (!S_ISREG(about.st_mode)) return Status::failure("is not a regular file");
    size_ = static_cast<std::uint64_t>(about.st_size);
    return {};
}

Status File::read(std::uint64_t offset, void* to, std::size_t count) {
    auto* at = static_cast<std::uint8_t*>(to);
    while (count > 0) {
        ssize_t got;
        if (cached_only) {
            const iovec part{at, count};
            got = ::preadv2(descriptor_, &part, 1, static_cast<off_t>(offset), RWF_NOWAIT);
            if (got == 0 || (got < 0 && errno != EINTR)) return {Status::not_cached, {}};
        } else {
            got = ::pread(descriptor_, at, count, static_cast<off_t>(offset));
            if (got < 0 && errno != EINTR)
                return Status::failure("cannot be read at byte " + std::to_string(offset) + ": " +
                                       system_reason(errno));
        }
        if (got < 0) continue;
        if (got == 0)
            return Status::failure("ends at byte " + std::to_string(offset) + ", " +
                                   std::to_string(count) + " bytes early: it is truncated");
        at += got;
        offset += static_cast<std::uint64_t>(got);
        count -= static_cast<std::size_t>(got);
    }
    return {};
}

void File::will_need(std::uint64_t offset, std::uint64_t count) const {
    // Only advice: where it is not taken the read waits for the disk.
    (void)::posix_fadvise(descriptor_, static_cast<off_t>(offset), static_cast<off_t>(count),
                          POSIX_FADV_WILLNEED);
}

Status Header::start(Source& source) {
    held_ = 0;
    const auto count = static_cast<std::size_t>(std::min<std::uint64_t>(source.size(), head_bytes));
    if (Status status = source.read(0, head_, count); !status.ok()) return status;
    held_ = count;
    return {};
}

Status Header::view(Source& source, std::uint64_t offset, std::uint64_t count,
                    const std::uint8_t*& bytes) {
    if (count > source.size() || offset > source.size() - count)
        return Status::failure("ends at byte " + std::to_string(source.size()) + ", but " +
                               std::to_string(count) + " bytes of its header lie at byte " +
                               std::to_string(offset));
    if (offset + count <= held_) {
        bytes = head_ + offset;
        return {};
    }
    std::uint8_t* to = elsewhere_.reserve(static_cast<std::size_t>(count));
    bytes = to;
    return source.read(offset, to, static_cast<std::size_t>(count));
}

// The sample that GDAL takes for nodata (GTiffDataset, GDALNoDataMaskBand): the number in the
// file's type, a fraction cut off an integer, nothing if it is out of range.
std::optional<std::uint64_t> nodata_sample(const std::string& text, const Layout& layout) {
    if (text.empty()) return {};
    const double value = number_of(text);
    if (layout.kind == Kind::floating)
        return layout.sample_bytes == 4 ? floating_bits<float>(value)
                                        : floating_bits<double>(value);
    const bool is_signed = layout.kind == Kind::signed_integer;
    if (layout.sample_bytes == 8) {  // exact digits: not by way of a double
        if (!std::isfinite(value)) return {};
        return is_signed ? static_cast<std::uint64_t>(std::strtoll(text.c_str(), nullptr, 10))
                         : std::strtoull(text.c_str(), nullptr, 10);
    }
    const double span = std::ldexp(1.0, static_cast<int>(8 * layout.sample_bytes));
    const double least = is_signed ? -span / 2 : 0, most = (is_signed ? span / 2 : span) - 1;
    if (!(value >= least && value <= most)) return {};
    return static_cast<std::uint64_t>(static_cast<std::int64_t>(value));
}

Status parse(Source& source, Header& header, bool georeference, Layout& layout) {
    if (Status status = header.start(source); !status.ok()) return status;
    Directory directory{source, header};
    std::uint64_t directory_at = 0;
    if (Status status = directory.start(directory_at); !status.ok()) return status;
    if (Status status = directory.read(directory_at); !status.ok()) return status;

    std::uint64_t width, height, bits, compression, photometric, fill, bands, rows, planar;
    std::uint64_t predictor, tile_width, tile_height, format, depth;
    const struct {
        Tag tag;
        std::uint64_t otherwise;  // TIFF 6.0's default
        std::uint64_t& to;
    } scalars[] = {{Tag::image_width, 0, width},           {Tag::image_length, 0, height},
                   {Tag::bits_per_sample, 1, bits},        {Tag::compression, 1, compression},
                   {Tag::photometric, 1, photometric},     {Tag::fill_order, 1, fill},
                   {Tag::samples_per_pixel, 1, bands},     {Tag::rows_per_strip, UINT32_MAX, rows},
                   {Tag::planar_configuration, 1, planar}, {Tag::predictor, 1, predictor},
                   {Tag::tile_width, 0, tile_width},       {Tag::tile_length, 0, tile_height},
                   {Tag::sample_format, 1, format},        {Tag::image_depth, 1, depth}};
    for (const auto& scalar : scalars)
        if (Status status = directory.value(scalar.tag, scalar.otherwise, scalar.to); !status.ok())
            return status;

    constexpr std::uint64_t longest = std::numeric_limits<std::int32_t>::max();
    const auto odd = [](Tag tag, std::uint64_t value, const char* why = "") {
        return bad_tag(tag, "is " + std::to_string(value) + why);
    };
    constexpr const char* unsupported = ", which is not supported";
    if (width == 0 || width > longest) return odd(Tag::image_width, width);
    if (height == 0 || height > longest) return odd(Tag::image_length, height);
    if (bands == 0 || bands > 65535) return odd(Tag::samples_per_pixel, bands);
    if (planar != 1 && planar != 2) return odd(Tag::planar_configuration, planar);
    if (fill != 1) return odd(Tag::fill_order, fill, unsupported);
    if (depth != 1) return odd(Tag::image_depth, depth, unsupported);
    if (photometric == 6) {  // YCbCr: pixels share their colours unless the file says otherwise
        std::uint64_t shared = 2;
        const Status status = directory.value(Tag::ycbcr_subsampling, 2, shared);
        if (status.code == Status::not_cached) return status;
        if (!status.ok() || shared != 1)
            return odd(Tag::photometric, photometric, ", YCbCr with subsampling: save it as RGB");
    }
    if (compression == 32946) compression = 8;  // DEFLATE's older number
    // Predictors belong to LZW, DEFLATE and ZSTD; elsewhere the tag means nothing.
    const bool predicts = compression == 5 || compression == 8 || compression == 50000;
    if (!predicts && compression != 1 && compression != 32773)
        return odd(Tag::compression, compression, unsupported);
    layout.compression = static_cast<Compression>(compression);
    layout.predictor = predicts ? static_cast<unsigned>(predictor) : 1;
    if (predicts && (predictor < 1 || predictor > 3))
        return odd(Tag::predictor, predictor, unsupported);
    if (bits != 8 && bits != 16 && bits != 32 && bits != 64)
        return odd(Tag::bits_per_sample, bits, unsupported);
    if (format < 1 || format > 3) return odd(Tag::sample_format, format, unsupported);
    if (format == 3 && bits < 32)
        return odd(Tag::bits_per_sample, bits, " with SampleFormat 3, which is not supported");
    layout.kind = static_cast<Kind>(format - 1);
    layout.sample_bytes = static_cast<unsigned>(bits / 8);
    if (layout.predictor == 3 && layout.kind != Kind::floating)
        return odd(Tag::predictor, 3, ", which needs floating point samples");

    layout.width = static_cast<std::uint32_t>(width);
    layout.height = static_cast<std::uint32_t>(height);
    layout.bands = static_cast<std::uint32_t>(bands);
    layout.separate = planar == 2 && bands > 1;
    layout.big_tiff = directory.big_tiff;
    layout.big_endian = directory.big_endian;
    const bool tile_tags = directory[Tag::tile_offsets].present();
    layout.tiled =
        tile_tags || directory[Tag::tile_width].present() || directory[Tag::tile_length].present();
    if (layout.tiled) {
        if (tile_width == 0 || tile_width > longest) return odd(Tag::tile_width, tile_width);
        if (tile_height == 0 || tile_height > longest) return odd(Tag::tile_length, tile_height);
    } else {
        if (rows == 0) return odd(Tag::rows_per_strip, rows);
        tile_width = width;
        tile_height = std::min(rows, height);
    }
    layout.chunk_width = static_cast<std::uint32_t>(tile_width);
    layout.chunk_height = static_cast<std::uint32_t>(tile_height);
    layout.chunks_across = (width + tile_width - 1) / tile_width;
    layout.chunks_down = (height + tile_height - 1) / tile_height;
    std::uint64_t bytes;
    if (__builtin_mul_overflow(layout.row_bytes(), tile_height, &bytes) || bytes > INT64_MAX)
        return bad_tag(layout.tiled ? Tag::tile_length : Tag::rows_per_strip,
                       "makes a strip or tile too large to address");

    std::uint64_t chunks;
    if (__builtin_mul_overflow(layout.chunks_across * layout.chunks_down,
                               layout.separate ? bands : std::uint64_t{1}, &chunks))
        return bad_tag(Tag::samples_per_pixel, "makes more strips or tiles than a file can hold");
    // Old writers list tiles under the strips' tags.
    if (Status status = directory.array(tile_tags ? Tag::tile_offsets : Tag::strip_offsets, chunks,
                                        layout.offsets);
        !status.ok())
        return status;
    const Tag counts = tile_tags ? Tag::tile_byte_counts : Tag::strip_byte_counts;
    layout.counts = {static_cast<std::uint16_t>(counts), 0, 0, 0};
    if (!layout.rows_tell_bytes() || directory[counts].present())
        if (Status status = directory.array(counts, chunks, layout.counts); !status.ok())
            return status;
    if (Status status = directory.nodata(layout, layout.nodata); !status.ok()) return status;
    layout.epsg.reset();
    if (georeference)
        if (Status status = directory.epsg(layout.epsg); !status.ok()) return status;
    if (bands > 1) return {};
    std::uint64_t pages;
    if (Status status = count_pages(directory, directory_at, layout, pages); !status.ok())
        return status;
    if (pages > 1)
        return Status::failure(std::to_string(pages) +
                               " pages of one band: save as bands of one page");
    return {};
}

Status entries(Source& source, Header& header, const Layout& layout, const TagArray& array,
               std::uint64_t first, std::uint64_t count, std::uint64_t* to) {
    const std::uint8_t* bytes = nullptr;
    const unsigned each = array.bytes;
    if (Status status = header.view(source, array.offset + first * each, count * each, bytes);
        !status.ok())
        return status;
    // A size known to the compiler makes `number` one load.
    with_word(each, [&](auto word) {
        for (std::uint64_t i = 0; i < count; ++i)
            to[i] = number(bytes + i * sizeof word, sizeof word, layout.big_endian);
    });
    return {};
}

const char* compression_name(Compression compression) {
    switch (compression) {
        case Compression::lzw: return "lzw";
        case Compression::deflate: return "deflate";
        case Compression::packbits: return "packbits";
        case Compression::zstd: return "zstd";
        case Compression::none: break;
    }
    return "none";
}

}  // namespace bandcrop
