// Reads many files, or parts of them, on several threads: one call for a batch, so that Python's lock is not taken and
// given back several times for each file.

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdint>
#include <thread>
#include <vector>

namespace {

constexpr int kAbi = 1;
constexpr int kOtherSize = -1;

struct Place {  // a row of the table that fastasync/images/read.py makes
  int64_t offset, size;
  int64_t start;  // where in the buffer its bytes go
  int64_t whole;  // not 0: the file must end there
};

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

// codes[i]: what became of file i.  A thread that cannot be started is done without.
void fastasync_read_files(const char* const* paths, const Place* places, int64_t count, uint8_t* buffer, int threads,
                          int* codes) {
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t i; (i = next.fetch_add(1)) < count;)
      codes[i] = read_one(paths[i], places[i], buffer + places[i].start);
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
