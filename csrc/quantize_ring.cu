// Quantize groups too large for one thread block while reading them once: experts, and lists of weights. A single group
// is quantize_whole.cu's.
//
// A scale needs the amax of its whole group before the first cast, so the chip has to hold the group meanwhile. One
// persistent thread block per processor keeps a ring of tiles in shared memory that bulk copies fill in order. A
// group is shared out to `parts` blocks; part p takes the group's tiles p, p + parts, ... In each block
//
//   the loader (one thread)  keeps the ring full;
//   the amax team            takes the amax of each tile as it arrives, and posts that of the part;
//   the scale warp           waits until all parts of the group are posted, and makes the scale;
//   the cast teams           cast the part's tiles out of the ring.
//
// Where parts are kept whole, cast teams take a part's first tiles into registers before its amax is known, so a slot
// is free when both the amax team and a cast team have read it.
//
// Groups overlap: while one waits for its last post, the next are loading.
//
// Where a part is larger than the ring, only its first tiles are kept there. The others pass through a second, smaller
// ring: in order for their amax alone, then again for the cast, from the last one, which the L2 cache still holds.
//
// Nobody waits for ever: parts of a group are on different blocks (parts <= blocks), each block takes its parts in
// the order of the groups, and posting a part needs only slots that parts of earlier groups free. So the earliest
// unfinished group always finishes.
#include <cooperative_groups.h>

#include <algorithm>
#include <utility>

#include "bulk_copy.cuh"
#include "kernels.h"
#include "mailboxes.cuh"

// Architectures without bulk copies get an empty kernel, which nobody launches, and use none of its functions.
#pragma nv_diag_suppress 177

namespace fp8_kernels {
namespace {

constexpr int kTeamThreads = 128, kTeamWarps = kTeamThreads / 32;
constexpr int kScales = 64;

// The amax team takes this many tiles before it passes the grid-wide barrier, which is long open by then.
constexpr int kTilesBeforeBarrier = 2;

// How a processor's shared memory is cut into tiles, and how many teams cast. Tiles that are not a multiple of 8 KB, or
// smaller, come up to a third slower.
constexpr int kTileBytes = 16384, kSlots = 14, kCastTeams = 2;
constexpr int kLoaderThread = kTeamThreads * (1 + kCastTeams), kNumThreads = kLoaderThread + 64;
// Where groups do not fit, the most slots that leave enough to pass the other tiles through.
constexpr int kKeptSlots = 10;
// Several groups at once, for parts of at least this many tiles and so fewer posts.
constexpr int kTilesPerPart = 3;

// Every part has a tile, and teams have turns: a team that still needs a part's scale holds back a slot, or its
// next one, that is at most kSlots + 2 * kCastTeams parts behind.
static_assert(kScales > kSlots + 2 * kCastTeams, "the scale warp never overwrites a scale in use");
static_assert(kKeptSlots % kCastTeams == 0 && kSlots % kCastTeams == 0, "uses of a slot are the same cast team's");

// Tiles that a block loads at once, where groups fit: it matters that they arrive in the order of the groups, so later
// loads of one block must not go before earlier ones of another.
constexpr int kMaxInFlight = 3;

struct alignas(128) Shared {
  uint8_t tiles[kSlots][kTileBytes];
  Barrier full[kSlots], empty[kSlots];
  Barrier posted[kScales], scale_known[kScales];
  Barrier loaded_again;
  uint32_t scales[kScales];
  uint32_t warp_amax[2][kTeamWarps];
};

// A place in a ring of `size` slots from `first`: which slot, and how often the ring has been passed.
//
// A barrier tells apart only a use of its slot and the one before. So whoever waits for a use must know that the one
// before is over: the loader and the amax team go through every use that they may wait for, or wait until others are
// over (loaded_again); a cast team has itself finished the use before, since sizes are multiples of kCastTeams, or all
// loads of that use are known to have arrived with the part's scale.
struct Place {
  int first, size;
  int offset = 0;
  uint32_t round = 0;

  __device__ Place(int first, int size) : first(first), size(size) {}
  __device__ int slot() const { return first + offset; }
  __device__ void advance(int n) {
    offset += n;
    while (offset >= size) {
      offset -= size;
      ++round;
    }
  }
};

// The ring of tiles that are kept, and the other's.
struct Places {
  Place kept, passing;
  __device__ Places(const RingParams& p, int slots)
      : kept(0, p.kept_slots), passing(p.kept_slots, max(1, slots - p.kept_slots)) {}
};

// The part of a group that a block takes.
struct Part {
  const RingWeight* weight;
  const uint8_t* source;
  uint8_t* target;
  uint32_t* mailboxes;
  int64_t scale_offset;
  int index, parts;
  int tiles, kept;  // of this part, its first ones are kept

  __device__ int64_t tile(int i) const { return index + static_cast<int64_t>(i) * parts; }
  __device__ int passing() const { return tiles - kept; }
};

__device__ Part locate(const RingParams& p, int64_t index) {
  int i = 0;
  while (i + 1 < p.num_weights && index >= p.weights[i + 1].first_part) ++i;
  const RingWeight& weight = p.weights[i];
  index -= weight.first_part;
  const int64_t group = weight.parts.divide(index);
  const int64_t unit = weight.rows.divide(group), row = group - unit * weight.rows.value;
  Part part;
  part.weight = &weight;
  part.source = weight.w + unit * weight.w_strides.unit + row * weight.w_strides.row;
  part.target = weight.q + unit * weight.q_strides.unit + row * weight.q_strides.row;
  part.scale_offset = unit * weight.scale_strides.unit + row * weight.scale_strides.row;
  part.parts = static_cast<int>(weight.parts.value);
  part.mailboxes = p.mailboxes + weight.first_mailbox + group * mailbox_stride(part.parts);
  // The parts with one tile more than the others are other blocks' in each group.
  const int64_t turned = index - group * part.parts + group * weight.remainder;
  part.index = static_cast<int>(turned - weight.parts.divide(turned) * part.parts);
  part.tiles = static_cast<int>(weight.parts.divide(weight.tiles - 1 - part.index)) + 1;
  part.kept = min(part.tiles, p.kept_slots);
  return part;
}

class Loader {
 public:
  __device__ Loader(const RingParams& p, Shared& shared)
      : p_(p), shared_(shared), places_(p, kSlots), arrived_(0, p.kept_slots), next_(blockIdx.x) {
    // What passes once more stays in the L2 cache until then. Where nothing does, hints cost time.
    const bool hints = p.is_large;
    kept_policy_ = again_policy_ = cache_policy(hints ? Hint::kLeaveFirst : Hint::kNormal);
    first_policy_ = cache_policy(hints ? Hint::kStay : Hint::kNormal);
  }

  // Load the next tile; false if there is none: a part's tiles in order, then those not kept from the last one.
  __device__ bool load() {
    if (done_ == loads_) {
      if (next_ >= p_.num_parts) return false;
      part_ = locate(p_, next_);
      next_ += gridDim.x;
      done_ = 0;
      loads_ = part_.tiles + part_.passing();
    }
    if (!p_.is_large && in_flight_++ >= kMaxInFlight) {
      shared_.full[arrived_.slot()].wait(arrived_.round);
      arrived_.advance(1);
    }
    if (done_ < part_.kept) {
      load_tile(done_, places_.kept, kept_policy_);
    } else if (done_ < part_.tiles) {
      load_tile(done_, places_.passing, first_policy_);
    } else {
      load_tile(loads_ + part_.kept - 1 - done_, places_.passing, again_policy_);
    }
    ++done_;
    return true;
  }

 private:
  __device__ void load_tile(int tile, Place& place, uint64_t policy) {
    if (place.round > 0) shared_.empty[place.slot()].wait(place.round - 1);
    const int64_t begin = part_.tile(tile) * kTileBytes;
    const auto bytes = static_cast<int>(min(static_cast<int64_t>(kTileBytes), part_.weight->group_bytes - begin));
    Barrier& full = shared_.full[place.slot()];
    full.expect_bytes(bytes);
    load_bulk(shared_.tiles[place.slot()], part_.source + begin, bytes, full, policy);
    place.advance(1);
  }

  const RingParams& p_;
  Shared& shared_;
  Places places_;
  Place arrived_;
  Part part_;
  int64_t next_;
  uint64_t kept_policy_, first_policy_, again_policy_;
  int done_ = 0, loads_ = 0;  // of the part
  int in_flight_ = 0;
};

// The vectors of a tile: how many, and the calling thread's, kTeamThreads apart.
template <typename T>
struct TileVecs {
  static constexpr int kVecBytes = kVecElements * sizeof(T);
  static constexpr int kPerThread = kTileBytes / kVecBytes / kTeamThreads;
  Vec<T> vecs[kPerThread];
  int num;

  __device__ TileVecs() {}
  __device__ TileVecs(const uint8_t* tile, int64_t bytes_left, int lane) {
    num = static_cast<int>(min(static_cast<int64_t>(kTileBytes), bytes_left)) / kVecBytes;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      vecs[i] = {};
      if (i * kTeamThreads + lane >= num) continue;
      const auto* source = reinterpret_cast<const uint4*>(tile + (i * kTeamThreads + lane) * kVecBytes);
#pragma unroll
      for (int j = 0; j < Vec<T>::kWords / 4; ++j) {
        const uint4 loaded = source[j];
        vecs[i].words[4 * j] = loaded.x;
        vecs[i].words[4 * j + 1] = loaded.y;
        vecs[i].words[4 * j + 2] = loaded.z;
        vecs[i].words[4 * j + 3] = loaded.w;
      }
    }
  }
};

template <typename T, typename F>
__device__ void find_amaxes(const RingParams& p, Shared& shared, int lane, F&& pass_barrier) {
  Places places(p, kSlots);
  int count = 0, parts_again = 0;
  for (int64_t index = blockIdx.x; index < p.num_parts; index += gridDim.x, ++count) {
    const Part part = locate(p, index);
    uint32_t acc = 0;
    const auto take = [&](int i, Place& place, bool leave) {
      shared.full[place.slot()].wait(place.round);
      const int64_t bytes_left = part.weight->group_bytes - part.tile(i) * kTileBytes;
      const TileVecs<T> tile(shared.tiles[place.slot()], bytes_left, lane);
#pragma unroll
      for (int j = 0; j < TileVecs<T>::kPerThread; ++j) acc = tile.vecs[j].max_abs(acc);
      if (leave) {
        __syncwarp();
        if (lane % 32 == 0) shared.empty[place.slot()].arrive();
      }
      place.advance(1);
    };
    for (int i = 0; i < part.tiles; ++i) {
      if (count == 0 && i == min(part.tiles, kTilesBeforeBarrier) - 1) pass_barrier();
      i < part.kept ? take(i, places.kept, !p.is_large) : take(i, places.passing, true);
    }
    acc = __reduce_max_sync(0xffffffff, Elements<T>::amax_bits(acc));
    if (lane % 32 == 0) shared.warp_amax[count % 2][lane / 32] = acc;
    __syncwarp();  // the barrier counts warps
    asm volatile("bar.sync 1, %0;" ::"n"(kTeamThreads) : "memory");
    if (lane == 0) {
      for (int i = 1; i < kTeamWarps; ++i) acc = max(acc, shared.warp_amax[count % 2][i]);
      post_amax(part.mailboxes + part.index, acc);
      shared.posted[count % kScales].arrive();
    }
    if (part.passing() > 0) {
      shared.loaded_again.wait(parts_again++);
      places.passing.advance(part.passing());
    }
  }
}

__device__ void make_scales(const RingParams& p, Shared& shared, int lane) {
  int count = 0;
  for (int64_t index = blockIdx.x; index < p.num_parts; index += gridDim.x, ++count) {
    const Part part = locate(p, index);
    // The others post at about the same time: to look before would only be in their way.
    shared.posted[count % kScales].wait(count / kScales);
    const uint32_t amax = __reduce_max_sync(0xffffffff, collect_mailboxes<32>(part.mailboxes, part.parts));
    const uint32_t stored = stored_scale(float_of(amax), p.fp8_type, p.pow2, p.scale_type, p.rule);
    if (lane == 0) {
      // Free to write: this part has been loaded, so the slots of the part kScales before it were free, and every
      // cast team had taken that part's scale.
      shared.scales[count % kScales] = bits_of(scale_value(stored, p.scale_type));
      shared.scale_known[count % kScales].arrive();
      if (part.index == 0) store_scale(stored, part.weight->scale, part.scale_offset, p.scale_type);
    }
  }
}

// Take a tile into registers, and leave its slot.
template <typename T>
__device__ TileVecs<T> take_tile(const Part& part, Shared& shared, const Place& place, int i, int lane) {
  shared.full[place.slot()].wait(place.round);
  const TileVecs<T> tile(shared.tiles[place.slot()], part.weight->group_bytes - part.tile(i) * kTileBytes, lane);
  __syncwarp();
  if (lane % 32 == 0) shared.empty[place.slot()].arrive();
  return tile;
}

template <typename T, Fp8Type kType, bool kPlain>
__device__ void store_tile(const Part& part, const TileVecs<T>& tile, const ScaleDivider& divide, int i, int lane) {
  uint2* target = reinterpret_cast<uint2*>(part.target + part.tile(i) * kTileBytes / sizeof(T)) + lane;
#pragma unroll
  for (int j = 0; j < TileVecs<T>::kPerThread; ++j) {
    if (j * kTeamThreads + lane < tile.num) {
      __stcs(target + j * kTeamThreads, codes_of<kType, kPlain>(tile.vecs[j], divide));
    }
  }
}

// Calls f with the FP8 type and whether the scale is a plain one, as constants.
template <typename F>
__device__ void dispatch_cast(Fp8Type type, bool plain, F&& f) {
  using E4M3 = std::integral_constant<Fp8Type, Fp8Type::kE4M3>;
  using E5M2 = std::integral_constant<Fp8Type, Fp8Type::kE5M2>;
  if (plain) {
    type == Fp8Type::kE4M3 ? f(E4M3{}, std::true_type{}) : f(E5M2{}, std::true_type{});
  } else {
    type == Fp8Type::kE4M3 ? f(E4M3{}, std::false_type{}) : f(E5M2{}, std::false_type{});
  }
}

// How many tiles from a place on until one is the team's.
__device__ int skipped(const Place& place, int team) {
  return (team + kCastTeams - place.offset % kCastTeams) % kCastTeams;
}

// Cast the tiles that are the team's, of parts that are kept whole. The first one of each waits for the scale in
// registers: two more slots to load into.
template <typename T>
__device__ void cast_kept(const RingParams& p, Shared& shared, int team, int lane) {
  Place kept(0, p.kept_slots);
  int count = 0;
  for (int64_t index = blockIdx.x; index < p.num_parts; index += gridDim.x, ++count) {
    const Part part = locate(p, index);
    Place place = kept;
    int i = skipped(place, team);
    place.advance(i);
    TileVecs<T> tile;
    if (i < part.tiles) tile = take_tile<T>(part, shared, place, i, lane);
    shared.scale_known[count % kScales].wait(count / kScales);
    const ScaleDivider divide(float_of(shared.scales[count % kScales]), p.rule);
    dispatch_cast(p.fp8_type, divide.is_plain(), [&](auto type, auto plain) {
      while (i < part.tiles) {
        store_tile<T, type.value, plain.value>(part, tile, divide, i, lane);
        i += kCastTeams;
        place.advance(kCastTeams);
        if (i < part.tiles) tile = take_tile<T>(part, shared, place, i, lane);
      }
    });
    kept.advance(part.tiles);
  }
}

template <typename T, Fp8Type kType, bool kPlain>
__device__ void cast_tile(const Part& part, Shared& shared, const ScaleDivider& divide, const Place& place, int i,
                          int lane) {
  store_tile<T, kType, kPlain>(part, take_tile<T>(part, shared, place, i, lane), divide, i, lane);
}

// The same of parts that are not kept whole: first the other tiles, from the last one. None is waited for before the
// scale is known: see Place.
template <typename T>
__device__ void cast_large(const RingParams& p, Shared& shared, int team, int lane) {
  Places places(p, kSlots);
  int count = 0;
  for (int64_t index = blockIdx.x; index < p.num_parts; index += gridDim.x, ++count) {
    const Part part = locate(p, index);
    places.passing.advance(part.passing());  // those loads were for the amax
    shared.scale_known[count % kScales].wait(count / kScales);
    const ScaleDivider divide(float_of(shared.scales[count % kScales]), p.rule);
    dispatch_cast(p.fp8_type, divide.is_plain(), [&](auto type, auto plain) {
      Place place = places.passing;
      int i = skipped(place, team);
      place.advance(i);
      for (; i < part.passing(); i += kCastTeams) {
        cast_tile<T, type.value, plain.value>(part, shared, divide, place, part.tiles - 1 - i, lane);
        place.advance(kCastTeams);
      }
      place = places.kept;
      i = skipped(place, team);
      place.advance(i);
      for (; i < part.kept; i += kCastTeams) {
        cast_tile<T, type.value, plain.value>(part, shared, divide, place, i, lane);
        place.advance(kCastTeams);
      }
    });
    places.kept.advance(part.kept);
    if (part.passing() > 0) {
      places.passing.advance(part.passing());
      __syncwarp();
      if (lane % 32 == 0) shared.loaded_again.arrive();
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kNumThreads, 1) quantize_ring_kernel(const __grid_constant__ RingParams p) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) uint8_t memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const int team = threadIdx.x / kTeamThreads, lane = threadIdx.x % kTeamThreads;

  // Empty the mailboxes of the block's own parts, and start to load.
  Loader loader(p, shared);
  if (threadIdx.x == kLoaderThread) {
    for (int i = 0; i < kSlots; ++i) {
      shared.full[i].init(1);
      shared.empty[i].init(p.is_large ? kTeamWarps : 2 * kTeamWarps);  // one team's, or two teams' warps
    }
    for (int i = 0; i < kScales; ++i) {
      shared.posted[i].init(1);
      shared.scale_known[i].init(1);
    }
    shared.loaded_again.init(kCastTeams * kTeamWarps);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    for (int i = 0; i < kTilesBeforeBarrier; ++i) loader.load();
  } else if (threadIdx.x < kLoaderThread) {
    const int64_t step = static_cast<int64_t>(gridDim.x) * kLoaderThread;
    for (int64_t i = static_cast<int64_t>(threadIdx.x) * gridDim.x + blockIdx.x; i < p.num_parts; i += step) {
      const Part part = locate(p, i);
      empty_mailbox(part.mailboxes, part.index, part.parts);
    }
  }
  __syncwarp();
  const auto grid = cooperative_groups::this_grid();
  auto token = grid.barrier_arrive();
  const auto pass_barrier = [&] {
    __syncwarp();
    grid.barrier_wait(std::move(token));
  };

  if (team == 0) {
    find_amaxes<T>(p, shared, lane, pass_barrier);
    return;
  }
  pass_barrier();
  if (team <= kCastTeams) {
    p.is_large ? cast_large<T>(p, shared, team - 1, lane) : cast_kept<T>(p, shared, team - 1, lane);
  } else if (threadIdx.x == kLoaderThread) {
    while (loader.load()) {
    }
  } else if (lane >= 32) {
    make_scales(p, shared, lane - 32);
  }
#endif
}

}  // namespace

bool has_ring() {
  int device = 0, major = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  return major >= 9;
}

void plan_ring(RingParams& p) {
  const int64_t processors = num_processors();
  int64_t all_bytes = 0, largest = 0;
  for (int i = 0; i < p.num_weights; ++i) {
    all_bytes += p.weights[i].num_groups * p.weights[i].group_bytes;
    largest = std::max(largest, p.weights[i].group_bytes);
  }
  p.is_large = largest > processors * kSlots * kTileBytes;
  p.kept_slots = p.is_large ? kKeptSlots : kSlots;
  const int64_t least = std::clamp<int64_t>(all_bytes / kTileBytes / (2 * processors), 1, kTilesPerPart);
  p.num_parts = p.num_mailboxes = 0;
  for (int i = 0; i < p.num_weights; ++i) {
    RingWeight& weight = p.weights[i];
    weight.tiles = (weight.group_bytes + kTileBytes - 1) / kTileBytes;
    // The blocks take one group at a time, or 2, 3, ... if that leaves parts of `least` tiles.
    const int64_t at_once = std::max<int64_t>(1, processors * least / weight.tiles);
    const int64_t parts = std::min(weight.tiles, std::max<int64_t>(1, processors / at_once));
    weight.parts = Divisor(parts);
    weight.remainder = weight.tiles % parts;
    weight.first_part = p.num_parts;
    weight.first_mailbox = p.num_mailboxes;
    p.num_parts += weight.num_groups * parts;
    p.num_mailboxes += weight.num_groups * mailbox_stride(parts);
    p.num_blocks = std::min<int64_t>(i == 0 ? processors / parts * parts : processors, p.num_parts);
  }
}

void launch_quantize_ring(const RingParams& params, InputType type, cudaStream_t stream) {
  dispatch_input(type, [&](auto element) {
    const auto* kernel = reinterpret_cast<const void*>(quantize_ring_kernel<decltype(element)>);
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared));
    void* arguments[] = {const_cast<RingParams*>(&params)};
    const dim3 grid(static_cast<unsigned>(params.num_blocks));
    cudaLaunchCooperativeKernel(kernel, grid, dim3(kNumThreads), arguments, sizeof(Shared), stream);
    check_launch();
  });
}

}  // namespace fp8_kernels
