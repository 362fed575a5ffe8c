#include "scratch.h"

#include <algorithm>
#include <cstdlib>
#include <new>

namespace cpux {

namespace {

constexpr int64_t kAlignment = 64;
constexpr int64_t kSmallestChunk = 1 << 20;

}  // namespace

void* Arena::bytes(int64_t size) {
  size = round_up(std::max<int64_t>(size, 1), kAlignment);
  if (chunks_.empty() || used_ + size > chunks_.back().size) {
    const int64_t chunk = std::max(size, kSmallestChunk);
    chunks_.reserve(chunks_.size() + 1);
    void* data = std::aligned_alloc(kAlignment, static_cast<size_t>(chunk));
    if (data == nullptr) throw std::bad_alloc();
    chunks_.push_back({static_cast<char*>(data), chunk});
    used_ = 0;
  }
  void* result = chunks_.back().data + used_;
  used_ += size;
  return result;
}

void Arena::reset() {
  if (chunks_.size() > 1) {  // next time, one chunk holds it all
    int64_t total = 0;
    for (const Chunk& chunk : chunks_) total += chunk.size;
    release();
    bytes(total);
  }
  used_ = 0;
}

void Arena::release() {
  for (const Chunk& chunk : chunks_) std::free(chunk.data);
  chunks_.clear();
}

Arena& fresh_arena() {
  static thread_local Arena arena;
  arena.reset();
  return arena;
}

}  // namespace cpux
