// Reads many files, or parts of them, on several threads, and looks at the headers of those that are JPEGs: one call for
// a batch, so that Python's lock is not taken and given back several times for each file.

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

namespace {

constexpr int kAbi = 2;
constexpr int kOtherSize = -1;

struct Place {  // a row of the table that fastasync/images/read.py makes
  int64_t offset, size;
  int64_t start;  // where in the buffer its bytes go
  int64_t whole;  // not 0: the file must end there
};

struct Size {
  int32_t width, height;
};

// plain_size of fastasync/images/transforms.py, which says what it is for; {0, 0} where that is None.
Size plain_size(const uint8_t* data, int64_t size) {
  const Size none{0, 0};
  const uint8_t begin[] = {0xFF, 0xD8}, end[] = {0xFF, 0xD9};
  const uint8_t* const stop = data + size;
  if (size < 2 || std::memcmp(data, begin, 2) != 0) return none;
  if (std::search(stop - std::min<int64_t>(size, 64), stop, end, end + 2) == stop) return none;
  const auto word = [&](int64_t at) { return data[at] << 8 | data[at + 1]; };
  bool is_rgb = false;
  for (int64_t at = 2; at + 10 < size && data[at] == 0xFF;) {
    const int marker = data[at + 1];
    if (marker == 0xFF) {  // a fill byte
      ++at;
      continue;
    }
    if (marker == 0xEE && at + 15 < size && std::memcmp(data + at + 4, "Adobe", 5) == 0) is_rgb = data[at + 15] == 0;
    if (0xC0 <= marker && marker <= 0xC2) {
      const int64_t first = at + 10, last = std::min<int64_t>(size, first + 3 * data[at + 9]);  // 3 bytes a component
      const int64_t components = (last - first + 2) / 3;
      const bool ycbcr = components == 3 && data[first] == 1 && data[first + 3] == 2 && data[first + 6] == 3 && !is_rgb;
      const Size found{word(at + 7), word(at + 5)};
      return data[at + 4] == 8 && (ycbcr || components == 1) && found.width && found.height ? found : none;
    }
    if ((0xC0 <= marker && marker <= 0xCF && marker != 0xC4 && marker != 0xCC) || marker == 0xD9 || marker == 0xDA)
      return none;
    at += 2 + word(at + 2);
  }
  return none;
}

// 0, an errno, or kOtherSize.
int read_one(const char* path, const Place& place, uint8_t* to) {
  const int file = open(path, O_RDONLY | O_CLOEXEC);
  if (file < 0) return errno;
  int code = 0;
  for (int64_t done = 0; done < place.size && code == 0;) {
    const ssize_t count = pread(file, to + done, place.size - done, place.offset + done);
    if (count > 0)
      done += count;
    else if (count == 0)
      code = kOtherSize;
    else if (errno != EINTR)
      code = errno;
  }
  uint8_t more;
  if (code == 0 && place.whole && pread(file, &more, 1, place.size) > 0) code = kOtherSize;
  close(file);
  return code;
}

}  // namespace

extern "C" {

int fastasync_read_files_abi() { return kAbi; }

// codes[i]: what became of file i; sizes[i]: its plain_size.  A thread that cannot be started is done without.
void fastasync_read_files(const char* const* paths, const Place* places, int64_t count, uint8_t* buffer, int threads,
                          int* codes, Size* sizes) {
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t i; (i = next.fetch_add(1)) < count;) {
      uint8_t* const data = buffer + places[i].start;
      codes[i] = read_one(paths[i], places[i], data);
      sizes[i] = codes[i] == 0 ? plain_size(data, places[i].size) : Size{0, 0};
    }
  };
  std::vector<std::thread> others;
  for (int64_t i = 1; i < std::min<int64_t>(threads, count); ++i) {
    try {
      others.emplace_back(work);
    } catch (...) {
      break;
    }
  }
  work();
  for (auto& other : others) other.join();
}

}  // extern "C"
