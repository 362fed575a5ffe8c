// Grow-only memory of one calling thread, in which a call finds room for everything it needs.
#pragma once

#include <cstdint>
#include <vector>

namespace cpux {

inline int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Pointers live until reset().
class Arena {
 public:
  ~Arena() { release(); }
  // 64-byte aligned, uninitialised; throws std::bad_alloc.
  template <class T>
  T* take(int64_t count) {
    return static_cast<T*>(bytes(count * static_cast<int64_t>(sizeof(T))));
  }
  void reset();

 private:
  void* bytes(int64_t size);
  void release();
  struct Chunk {
    char* data;
    int64_t size;
  };
  std::vector<Chunk> chunks_;
  int64_t used_ = 0;  // of the last chunk
};

// The calling thread's arena, emptied.
Arena& fresh_arena();

}  // namespace cpux
