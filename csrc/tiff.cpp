#include "tiff.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <limits>
#include <new>
#include <system_error>
#include <type_traits>

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

const char* tag_name(unsigned tag) {
    switch (tag) {
        case 256: return "ImageWidth";
        case 257: return "ImageLength";
        case 258: return "BitsPerSample";
        case 259: return "Compression";
        case 266: return "FillOrder";
        case 273: return "StripOffsets";
        case 277: return "SamplesPerPixel";
        case 278: return "RowsPerStrip";
        case 279: return "StripByteCounts";
        case 284: return "PlanarConfiguration";
        case 317: return "Predictor";
        case 322: return "TileWidth";
        case 323: return "TileLength";
        case 324: return "TileOffsets";
        case 325: return "TileByteCounts";
        case 339: return "SampleFormat";
        case 34735: return "GeoKeyDirectory";
        case 42113: return "GDAL_NODATA";
        default: return "unknown";
    }
}

Status bad_tag(unsigned tag, const std::string& what) {
    return Status::failure("tag " + std::to_string(tag) + " (" + tag_name(tag) + ") " + what);
}

struct Entry {
    unsigned tag = 0, type = 0;
    std::uint64_t count = 0;
    std::uint64_t offset = 0;  // of the values in the file, wherever they are

    bool present() const { return tag != 0; }
};

// The entries of the first directory, looked up by tag.
struct Directory {
    Source& source;
    Header& header;
    bool big_endian = false;
    bool big_tiff = false;
    // In the order of `wanted`.
    static constexpr unsigned wanted[] = {256, 257, 258, 259, 266, 273, 277, 278,   279,
                                          284, 317, 322, 323, 324, 325, 339, 34735, 42113};
    Entry found[std::size(wanted)] = {};

    const Entry& operator[](unsigned tag) const {
        return found[std::lower_bound(std::begin(wanted), std::end(wanted), tag) -
                     std::begin(wanted)];
    }

    Status read() {
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
        std::uint64_t at = number(bytes + 4, 4, big_endian);
        if (big_tiff) {
            if (Status status = header.view(source, 4, 12, bytes); !status.ok()) return status;
            if (number(bytes, 2, big_endian) != 8 || number(bytes + 2, 2, big_endian) != 0)
                return Status::failure("BigTIFF offsets at byte 4 are not of 8 bytes");
            at = number(bytes + 4, 8, big_endian);
        }
        const unsigned head = big_tiff ? 8 : 2, size = big_tiff ? 20 : 12, place = big_tiff ? 8 : 4;
        if (Status status = header.view(source, at, head, bytes); !status.ok()) return status;
        const std::uint64_t entries = number(bytes, head, big_endian);
        if (entries > 65535)
            return Status::failure("directory at byte " + std::to_string(at) + " claims " +
                                   std::to_string(entries) + " entries");
        if (Status status = header.view(source, at + head, entries * size, bytes); !status.ok())
            return status;
        for (std::uint64_t i = 0; i < entries; ++i) {
            const std::uint8_t* b = bytes + i * size;
            const unsigned tag = static_cast<unsigned>(number(b, 2, big_endian));
            const auto* slot = std::lower_bound(std::begin(wanted), std::end(wanted), tag);
            if (slot == std::end(wanted) || *slot != tag) continue;
            Entry& entry = found[slot - std::begin(wanted)];
            if (entry.present()) continue;  // of a tag given twice the first counts
            entry.type = static_cast<unsigned>(number(b + 2, 2, big_endian));
            entry.count = number(b + 4, place, big_endian);
            const unsigned each = type_bytes(entry.type);
            if (each == 0)
                return bad_tag(tag, "has the unknown field type " + std::to_string(entry.type));
            if (entry.count == 0) return bad_tag(tag, "has no value");
            entry.tag = tag;
            // Values that fit stand in the entry itself, others where it points.
            entry.offset = entry.count <= place / each ? at + head + i * size + 4 + place
                                                       : number(b + 4 + place, place, big_endian);
            if (entry.count > source.size() / each ||
                entry.offset > source.size() - entry.count * each)
                return bad_tag(tag,
                               "points past the end of the file: " + std::to_string(entry.count) +
                                   " values at byte " + std::to_string(entry.offset));
        }
        return {};
    }

    // The value of `tag`, the same for every band where there are several; `otherwise` if absent.
    Status value(unsigned tag, std::uint64_t otherwise, std::uint64_t& to) {
        const Entry& entry = (*this)[tag];
        to = otherwise;
        if (!entry.present()) return {};
        if (!is_unsigned(entry.type)) return bad_tag(tag, "is not of an unsigned integer type");
        const std::uint8_t* bytes = nullptr;
        const unsigned each = type_bytes(entry.type);
        const std::uint64_t count = std::min<std::uint64_t>(entry.count, 65535);
        if (Status status = header.view(source, entry.offset, count * each, bytes); !status.ok())
            return status;
        to = number(bytes, each, big_endian);
        for (std::uint64_t i = 1; i < count; ++i)
            if (number(bytes + i * each, each, big_endian) != to)
                return bad_tag(tag, "differs between bands, which is not supported");
        return {};
    }

    Status array(unsigned tag, std::uint64_t needed, TagArray& to) {
        const Entry& entry = (*this)[tag];
        if (!entry.present()) return bad_tag(tag, "is missing");
        if (!is_unsigned(entry.type)) return bad_tag(tag, "is not of an unsigned integer type");
        if (entry.count < needed)
            return bad_tag(tag, "has " + std::to_string(entry.count) + " values, the image needs " +
                                    std::to_string(needed));
        to = {static_cast<std::uint16_t>(tag), entry.offset, entry.count, type_bytes(entry.type)};
        return {};
    }

    // GDAL writes nodata as text. Text that is no number is no nodata, as for GDAL.
    Status nodata(std::optional<double>& to) {
        const Entry& entry = (*this)[42113];
        to.reset();
        if (!entry.present() || entry.type != 2) return {};
        const std::uint8_t* bytes = nullptr;
        const std::uint64_t count = std::min<std::uint64_t>(entry.count, 64);
        if (Status status = header.view(source, entry.offset, count, bytes); !status.ok())
            return status;
        const char* text = reinterpret_cast<const char*>(bytes);
        const char* end = text + count;
        while (text != end && (*text == ' ' || *text == '+')) ++text;
        double value = 0;
        if (std::from_chars(text, end, value).ec == std::errc{}) to = value;
        return {};
    }

    Status epsg(std::optional<int>& to) {
        const Entry& entry = (*this)[34735];
        to.reset();
        if (!entry.present() || entry.type != 3 || entry.count < 4) return {};
        const std::uint8_t* bytes = nullptr;
        const std::uint64_t count = std::min<std::uint64_t>(entry.count, 4096);
        if (Status status = header.view(source, entry.offset, count * 2, bytes); !status.ok())
            return status;
        for (std::uint64_t i = 4; i + 4 <= count; i += 4) {
            const auto key = number(bytes + 2 * i, 2, big_endian);
            const auto place = number(bytes + 2 * i + 2, 2, big_endian);
            const auto code = static_cast<int>(number(bytes + 2 * i + 6, 2, big_endian));
            const bool known = place == 0 && code != 0 && code != 32767;  // 32767: user-defined
            if (key == 3072 && known) to = code;                          // ProjectedCSType
            if (key == 2048 && known && !to) to = code;                   // GeographicType
        }
        return {};
    }
};

Status sample_type(std::uint64_t bits, std::uint64_t format, Layout& layout) {
    if (bits != 8 && bits != 16 && bits != 32 && bits != 64)
        return bad_tag(258, "is " + std::to_string(bits) + ", which is not supported");
    if (format < 1 || format > 3)
        return bad_tag(339, "is " + std::to_string(format) + ", which is not supported");
    if ((format == 3) != (bits == 64) && !(format == 3 && bits == 32))
        return bad_tag(258, "is " + std::to_string(bits) + " with SampleFormat " +
                                std::to_string(format) + ", which is not supported");
    layout.kind = format == 1   ? Kind::unsigned_integer
                  : format == 2 ? Kind::signed_integer
                                : Kind::floating;
    layout.sample_bytes = static_cast<unsigned>(bits / 8);
    return {};
}

}  // namespace

File::~File() {
    if (descriptor_ >= 0) ::close(descriptor_);
}

Status File::open(const char* path) {
    if (descriptor_ >= 0) ::close(descriptor_);
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
            if (got < 0 && errno != EINTR) return {Status::not_cached, {}};
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

Status parse(Source& source, Header& header, bool georeference, Layout& layout) {
    if (Status status = header.start(source); !status.ok()) return status;
    Directory directory{source, header};
    if (Status status = directory.read(); !status.ok()) return status;

    std::uint64_t width, height, bits, compression, fill, bands, rows, planar, predictor, format;
    std::uint64_t tile_width, tile_height;
    const struct {
        unsigned tag;
        std::uint64_t otherwise;  // TIFF 6.0's default
        std::uint64_t& to;
    } scalars[] = {{256, 0, width},         {257, 0, height},      {258, 1, bits},
                   {259, 1, compression},   {266, 1, fill},        {277, 1, bands},
                   {278, UINT32_MAX, rows}, {284, 1, planar},      {317, 1, predictor},
                   {322, 0, tile_width},    {323, 0, tile_height}, {339, 1, format}};
    for (const auto& scalar : scalars)
        if (Status status = directory.value(scalar.tag, scalar.otherwise, scalar.to); !status.ok())
            return status;

    constexpr std::uint64_t longest = std::numeric_limits<std::int32_t>::max();
    if (width == 0 || width > longest) return bad_tag(256, "is " + std::to_string(width));
    if (height == 0 || height > longest) return bad_tag(257, "is " + std::to_string(height));
    if (bands == 0 || bands > 65535) return bad_tag(277, "is " + std::to_string(bands));
    if (planar != 1 && planar != 2) return bad_tag(284, "is " + std::to_string(planar));
    if (fill != 1) return bad_tag(266, "is " + std::to_string(fill) + ", which is not supported");
    if (compression == 32946) compression = 8;  // DEFLATE's older number
    switch (compression) {
        case 1:
        case 5:
        case 8:
        case 32773:
        case 50000: break;
        default:
            return bad_tag(259, "is " + std::to_string(compression) + ", which is not supported");
    }
    layout.compression = static_cast<Compression>(compression);
    // Predictors belong to LZW, DEFLATE and ZSTD; elsewhere the tag means nothing.
    const bool predicts = compression == 5 || compression == 8 || compression == 50000;
    layout.predictor = predicts ? static_cast<unsigned>(predictor) : 1;
    if (predicts && (predictor < 1 || predictor > 3))
        return bad_tag(317, "is " + std::to_string(predictor) + ", which is not supported");
    if (Status status = sample_type(bits, format, layout); !status.ok()) return status;
    if (layout.predictor == 3 && layout.kind != Kind::floating)
        return bad_tag(317, "is 3, which needs floating point samples");

    layout.width = static_cast<std::uint32_t>(width);
    layout.height = static_cast<std::uint32_t>(height);
    layout.bands = static_cast<std::uint32_t>(bands);
    layout.separate = planar == 2 && bands > 1;
    layout.big_tiff = directory.big_tiff;
    layout.big_endian = directory.big_endian;
    layout.tiled = directory[324].present();
    if (layout.tiled) {
        if (tile_width == 0 || tile_width > longest)
            return bad_tag(322, "is " + std::to_string(tile_width));
        if (tile_height == 0 || tile_height > longest)
            return bad_tag(323, "is " + std::to_string(tile_height));
    } else {
        if (rows == 0) return bad_tag(278, "is 0");
        tile_width = width;
        tile_height = std::min(rows, height);
    }
    layout.chunk_width = static_cast<std::uint32_t>(tile_width);
    layout.chunk_height = static_cast<std::uint32_t>(tile_height);
    layout.chunks_across = (width + tile_width - 1) / tile_width;
    layout.chunks_down = (height + tile_height - 1) / tile_height;
    std::uint64_t bytes;
    if (__builtin_mul_overflow(layout.row_bytes(), tile_height, &bytes) || bytes > INT64_MAX)
        return bad_tag(layout.tiled ? 323 : 278, "makes a strip or tile too large to address");

    std::uint64_t chunks;
    if (__builtin_mul_overflow(layout.chunks_across * layout.chunks_down,
                               layout.separate ? bands : std::uint64_t{1}, &chunks))
        return bad_tag(277, "makes more strips or tiles than a file can hold");
    if (Status status = directory.array(layout.tiled ? 324 : 273, chunks, layout.offsets);
        !status.ok())
        return status;
    if (Status status = directory.array(layout.tiled ? 325 : 279, chunks, layout.counts);
        !status.ok())
        return status;
    if (Status status = directory.nodata(layout.nodata); !status.ok()) return status;
    layout.epsg.reset();
    return georeference ? directory.epsg(layout.epsg) : Status{};
}

Status entries(Source& source, Header& header, const Layout& layout, const TagArray& array,
               std::uint64_t first, std::uint64_t count, std::uint64_t* to) {
    const std::uint8_t* bytes = nullptr;
    const unsigned each = array.bytes;
    if (Status status = header.view(source, array.offset + first * each, count * each, bytes);
        !status.ok())
        return status;
    // A size known to the compiler makes `number` one load.
    const auto widen = [&](auto size) {
        for (std::uint64_t i = 0; i < count; ++i)
            to[i] = number(bytes + i * size, size, layout.big_endian);
    };
    switch (each) {
        case 1: widen(std::integral_constant<unsigned, 1>{}); break;
        case 2: widen(std::integral_constant<unsigned, 2>{}); break;
        case 4: widen(std::integral_constant<unsigned, 4>{}); break;
        default: widen(std::integral_constant<unsigned, 8>{}); break;
    }
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
