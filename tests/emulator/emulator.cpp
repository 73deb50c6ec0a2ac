#include "emulator.h"

#include <ucontext.h>

#include <algorithm>
#include <csetjmp>
#include <memory>
#include <numeric>
#include <random>
#include <set>
#include <vector>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulator {
namespace {

constexpr size_t kStack = 256 * 1024;
constexpr size_t kMaxShared = 227 * 1024;  // per block on sm_90; the smallest target, sm_86, has 99 KB

struct Copy {
  void* to;
  const void* from;
  int bytes;
};

enum class State { kReady, kAtBarrier, kAtWarp, kDone };

struct Fiber {
  std::unique_ptr<char[]> stack{new char[kStack]};
  ucontext_t entry;
  jmp_buf resume;
  bool entered = false;
  State state = State::kDone;
  std::vector<std::vector<Copy>> groups;  // committed, oldest first
  std::vector<Copy> open;
};

struct Warp {
  int arrived = 0;
  void* lanes[kLanes];
};

std::vector<Fiber> fibers;
std::vector<Warp> warps;
std::vector<unsigned char> shared_pool;
unsigned char* shared_base = nullptr;
size_t shared_size = 0;
size_t running = 0;
uint64_t seed = 0;
const std::function<void()>* body = nullptr;
std::string failure;
jmp_buf scheduler;

std::string broken_kernel;
Fault chosen_fault = Fault::kNone;
Fault fault = Fault::kNone;   // of the running kernel
uint64_t launches = 0;        // of the broken kernel
std::set<std::string> names;  // launched

// Returns to the scheduler, which resumes the fiber here when it may continue.
void yield() {
  if (!_setjmp(fibers[running].resume)) _longjmp(scheduler, 1);
}

void enter() {
  (*body)();
  fibers[running].state = State::kDone;
  _longjmp(scheduler, 1);
}

void resume(size_t i) {
  running = i;
  const bool one_lower = fault == Fault::kLastThread && i + 1 == blockDim.x;
  threadIdx = {static_cast<unsigned>(i) - one_lower, 0, 0};
  Fiber& fiber = fibers[i];
  if (_setjmp(scheduler)) return;
  if (fiber.entered) _longjmp(fiber.resume, 1);
  fiber.entered = true;
  getcontext(&fiber.entry);
  fiber.entry.uc_stack.ss_sp = fiber.stack.get();
  fiber.entry.uc_stack.ss_size = kStack;
  fiber.entry.uc_link = nullptr;
  makecontext(&fiber.entry, &enter, 0);
  setcontext(&fiber.entry);
}

std::vector<size_t> ordered(size_t n, uint64_t salt) {
  std::vector<size_t> all(n);
  std::iota(all.begin(), all.end(), 0);
  if (seed == 1) std::reverse(all.begin(), all.end());
  if (seed > 1) {
    std::mt19937_64 random(seed * 1000003 + salt);
    std::shuffle(all.begin(), all.end(), random);
  }
  return all;
}

// Runs one warp until every lane waits at the barrier or is done.
void run_warp(size_t warp, int threads) {
  const size_t first = warp * kLanes, last = std::min<size_t>(first + kLanes, threads);
  for (bool moved = true; moved;) {
    moved = false;
    for (size_t i = first; i < last; ++i)
      if (fibers[i].state == State::kReady) {
        resume(i);
        if (!failure.empty()) return;
        moved = true;
      }
  }
}

void run_block(int threads, uint64_t salt) {
  for (int i = 0; i < threads; ++i) {
    fibers[i].entered = false;
    fibers[i].state = State::kReady;
    fibers[i].groups.clear();
    fibers[i].open.clear();
  }
  for (Warp& warp : warps) warp.arrived = 0;
  std::memset(shared_base, 0xff, shared_size);  // NaN in every floating-point type
  const size_t n = (threads + kLanes - 1) / kLanes;
  for (uint64_t round = 0;; ++round) {
    for (size_t warp : ordered(n, salt * 7919 + round)) {
      run_warp(warp, threads);
      if (!failure.empty()) return;
    }
    bool done = true;
    for (int i = 0; i < threads; ++i) {
      if (fibers[i].state == State::kAtWarp) {
        failure = "thread " + std::to_string(i) + " waits for lanes of its warp that took another branch";
        return;
      }
      done &= fibers[i].state == State::kDone;
    }
    if (done) break;
    for (int i = 0; i < threads; ++i)
      if (fibers[i].state == State::kAtBarrier) fibers[i].state = State::kReady;
  }
}

}  // namespace

void order(uint64_t to) {
  seed = to;
}

unsigned char* shared_memory() {
  return shared_base;
}

size_t shared_bytes() {
  return shared_size;
}

void fail(const std::string& why) {
  failure = why + " (block " + std::to_string(blockIdx.x) + "," + std::to_string(blockIdx.y) + "," +
            std::to_string(blockIdx.z) + ", thread " + std::to_string(running) + ")";
  _longjmp(scheduler, 1);
}

bool loses_product(int lane, int element) {
  return fault == Fault::kProduct && lane == 5 && element == 2;
}

void break_kernel(const std::string& name, Fault to) {
  broken_kernel = name;
  chosen_fault = to;
  launches = 0;
}

std::string launched() {
  std::string all;
  for (const std::string& name : names) all += name + ",";
  names.clear();
  return all;
}

void barrier() {
  if (fault == Fault::kBarrier) return;
  fibers[running].state = State::kAtBarrier;
  yield();
}

void warp(void (*together)(void* (&lanes)[kLanes]), void* mine) {
  Warp& all = warps[running / kLanes];
  all.lanes[running % kLanes] = mine;
  if (++all.arrived < kLanes) {
    fibers[running].state = State::kAtWarp;
    yield();
    return;
  }
  together(all.lanes);
  all.arrived = 0;
  const size_t first = running / kLanes * kLanes;
  for (size_t i = first; i < first + kLanes; ++i)
    if (fibers[i].state == State::kAtWarp) fibers[i].state = State::kReady;
}

void copy_async(void* shared, const void* global, int bytes) {
  require_shared(shared, bytes);
  if (reinterpret_cast<uintptr_t>(global) % bytes) fail("an asynchronous copy from a misaligned address");
  fibers[running].open.push_back({shared, global, bytes});
}

void commit() {
  Fiber& fiber = fibers[running];
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open.clear();
}

void wait(int groups_left) {
  if (fault == Fault::kCopy) ++groups_left;
  auto& groups = fibers[running].groups;
  while (static_cast<int>(groups.size()) > groups_left) {
    for (const Copy& copy : groups.front()) std::memcpy(copy.to, copy.from, copy.bytes);
    groups.erase(groups.begin());
  }
}

void run(const char* name, const dim3& grid, int threads, size_t shared, const std::function<void()>& what) {
  names.insert(name);
  fault = name == broken_kernel ? chosen_fault : Fault::kNone;
  if (fault == Fault::kRefused) throw std::runtime_error(std::string("emulated kernel: refused ") + name);
  if (threads < 1 || threads > 1024) throw std::runtime_error("a block has 1 to 1024 threads");
  if (threads % kLanes) throw std::runtime_error("the threads of an emulated block must be whole warps");
  if (shared > kMaxShared) throw std::runtime_error("more shared memory than a block can have");
  if (!grid.x || !grid.y || !grid.z || grid.y > 65535 || grid.z > 65535) throw std::runtime_error("grid out of range");
  while (fibers.size() < static_cast<size_t>(threads)) fibers.emplace_back();
  warps.resize((threads + kLanes - 1) / kLanes);
  shared_pool.resize(kMaxShared + 1024);
  shared_base = shared_pool.data() + (1024 - reinterpret_cast<uintptr_t>(shared_pool.data()) % 1024);
  shared_size = shared;
  blockDim = dim3(threads);
  gridDim = grid;
  body = &what;
  failure.clear();
  const size_t blocks = size_t{grid.x} * grid.y * grid.z;
  const bool lacks_last = fault == Fault::kLastBlock || (fault == Fault::kUnrepeatable && ++launches % 2 == 0);
  for (size_t block : ordered(blocks, 0)) {
    if (lacks_last && block + 1 == blocks) continue;
    blockIdx = {static_cast<unsigned>(block % grid.x), static_cast<unsigned>(block / grid.x % grid.y),
                static_cast<unsigned>(block / grid.x / grid.y)};
    run_block(threads, block + 1);
    if (!failure.empty()) throw std::runtime_error("emulated kernel: " + failure);
  }
}

}  // namespace emulator

extern "C" void gramophone_emulator_order(uint64_t seed) {
  emulator::order(seed);
}

extern "C" void gramophone_emulator_break(const char* name, int fault) {
  emulator::break_kernel(name, static_cast<emulator::Fault>(fault));
}

extern "C" const char* gramophone_emulator_launched() {
  static std::string names;
  names = emulator::launched();
  return names.c_str();
}
