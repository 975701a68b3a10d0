// "twin": an accelerator for machines that have none. Its memory is the host's and its kernels are the CPU's, so results equal the CPU's
// bit by bit; everything around the kernels behaves as on CUDA: streams, events, copies that arrive late, memory limits, places where the
// host waits. "twinccl" is its collective backend: as NCCL it takes tensors of the device only. README.md says what this cannot show.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/SparseTensorImpl.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <pthread.h>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/Work.hpp>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <condition_variable>
#include <list>
#include <map>
#include <mutex>
#include <set>
#include <thread>
#include <unordered_set>

namespace {
using at::Tensor;
using c10::DispatchKey;
using c10::DispatchKeySet;
constexpr auto TYPE = c10::DeviceType::PrivateUse1;

int n_devices = 2;
bool has_float64 = true;
bool checks_races = true;
thread_local int current_device = 0;
int device_or_current(int index) { return index < 0 ? current_device : index; }

// ---------------------------------------------------------------------------------------------------------------- where the host waits
py::object* on_wait = nullptr;          // callable(kind, op) -> None, or a text to raise
std::atomic<bool> watched{false};

void host_waits(const std::string& kind, const std::string& op) {
  if (!watched) return;
  std::string refused;
  {
    py::gil_scoped_acquire gil;
    if (on_wait->is_none()) return;
    auto answer = (*on_wait)(kind, op);
    if (!answer.is_none()) refused = answer.cast<std::string>();
  }
  TORCH_CHECK(refused.empty(), refused);
}

// Whoever may wait for another thread must not hold Python's lock meanwhile: that thread may need it.
struct WithoutGil {
  std::optional<py::gil_scoped_release> released;
  WithoutGil() { if (Py_IsInitialized() && PyGILState_Check()) released.emplace(); }
};

// ------------------------------------------------------------------------------------------------------------------ streams and clocks
// Every stream counts its operations. A clock says, for each stream, up to which operation everything has happened before: a stream's
// clock grows with its own operations and with the events that it waits for, the host's with what it synchronizes. This is all that
// orders work here: a late copy is done once somebody's clock says it is over, and a use that the clocks do not order is a race.
constexpr int POOL = 32;                // torch's own pools have this size; then the same stream is given out again
constexpr int PER_DEVICE = 1 + POOL + 8;  // the default stream, the pool, those of twinccl
using Clock = std::vector<uint64_t>;
struct StreamState { uint64_t launched = 0, asked = 0; Clock known; };
struct Mark { int stream = -1; uint64_t at = 0; };

struct Task {                           // something that a stream has yet to do
  Mark mark;
  std::function<void()> run;
  std::vector<const void*> writes;      // host storages
  bool running = false;
  std::thread::id thread;
};
struct Landing {                        // bytes on their way into the host's memory, which has them when the host has waited
  Mark mark;
  std::function<void()> run;
  const void* into;
};

// Never destroyed: tensors may be freed after static objects are.
auto& mutex = *new std::mutex;          // guards what follows; whoever holds it neither waits nor takes Python's lock
auto& arrived = *new std::condition_variable;
auto& streams = *new std::vector<StreamState>;
auto& host_known = *new Clock;
auto& tasks = *new std::list<std::shared_ptr<Task>>;
auto& landings = *new std::list<Landing>;
auto& races = *new std::vector<std::string>;
int next_in_pool[64] = {}, next_comm[64] = {};
thread_local std::vector<int64_t> current_ids;

c10::Stream make_stream(int device, int64_t id) {
  return c10::Stream(c10::Stream::UNSAFE, c10::Device(TYPE, static_cast<c10::DeviceIndex>(device)), id);
}
int index_of(const c10::Stream& s) { return device_or_current(s.device_index()) * PER_DEVICE + static_cast<int>(s.id()); }
int64_t& current_id(int device) {
  if (current_ids.empty()) current_ids.resize(n_devices, 0);
  return current_ids.at(device);
}
int current_stream(int device) { return device * PER_DEVICE + static_cast<int>(current_id(device)); }
std::string name_of(int stream) { return c10::str("stream ", stream % PER_DEVICE, " of twin:", stream / PER_DEVICE); }
void join(Clock& into, const Clock& other) { for (size_t i = 0; i < into.size(); i++) into[i] = std::max(into[i], other[i]); }
bool over(const Clock& known, const Mark& m) { return known[m.stream] >= m.at || host_known[m.stream] >= m.at; }
Clock known_to(int stream) { std::lock_guard<std::mutex> lock(mutex); return streams[stream].known; }

// Does, in the order in which they were given, the tasks that are over according to `known` (and write one of `only`, if given).
void catch_up(const Clock& known, const std::vector<const void*>* only = nullptr) {
  {
    std::lock_guard<std::mutex> lock(mutex);
    if (tasks.empty()) return;
  }
  WithoutGil no_gil;
  std::vector<std::shared_ptr<Task>> done;  // dropped last: what a task holds may need Python's lock
  std::unique_lock<std::mutex> lock(mutex);
  for (auto it = tasks.begin(); it != tasks.end();) {
    auto task = *it;
    bool wanted = over(known, task->mark);
    if (only && wanted) wanted = std::any_of(only->begin(), only->end(), [&](auto s) {
      return std::find(task->writes.begin(), task->writes.end(), s) != task->writes.end(); });
    if (!wanted || (task->running && task->thread == std::this_thread::get_id())) { ++it; continue; }
    if (task->running) arrived.wait(lock);
    else {
      task->running = true;
      task->thread = std::this_thread::get_id();
      done.push_back(task);
      lock.unlock();
      std::exception_ptr error;
      try { task->run(); } catch (...) { error = std::current_exception(); }
      lock.lock();
      tasks.remove(task);
      arrived.notify_all();
      if (error) { lock.unlock(); std::rethrow_exception(error); }
    }
    it = tasks.begin();
  }
}

// The host has waited until everything in `known` was over: it sees what was copied to it.
void host_catches_up(const Clock& known) {
  Clock all;
  {
    std::lock_guard<std::mutex> lock(mutex);
    join(host_known, known);
    all = host_known;
  }
  catch_up(all);
  std::list<Landing> now;
  {
    std::lock_guard<std::mutex> lock(mutex);
    for (auto it = landings.begin(); it != landings.end();) {
      auto next = std::next(it);
      if (over(all, it->mark)) now.splice(now.end(), landings, it);
      it = next;
    }
  }
  for (auto& landing : now) landing.run();
}

struct Event { Clock known; bool recorded = false, asked = false, timed = false; std::chrono::steady_clock::time_point when; };
bool is_over_for_host(const Clock& known) {
  std::lock_guard<std::mutex> lock(mutex);
  for (size_t i = 0; i < known.size(); i++) if (known[i] > host_known[i]) return false;
  return true;
}

// -------------------------------------------------------------------------------------------------------------------------- memory
struct Block {                          // of device memory
  c10::Storage host;                    // the same memory for CPU kernels
  size_t size;
  int device, stream;                   // allocated on
  Mark written;
  std::string writer;
  std::map<int, uint64_t> reads, uses;  // by stream: since the last write, and ever
  std::set<int> recorded;               // streams of record_stream
};
struct Memory { size_t allocated = 0, peak = 0, limit = size_t(1) << 33; int64_t n_blocks = 0, n_ooms = 0; };
Memory memory[64];

void free_block(void* context) {
  std::unique_ptr<Block> block(static_cast<Block*>(context));
  bool raced = false;
  {
    std::lock_guard<std::mutex> lock(mutex);
    memory[block->device].allocated -= block->size;
    memory[block->device].n_blocks--;
    for (auto& [stream, at] : block->uses) {
      if (stream == block->stream || block->recorded.count(stream) || over(streams[block->stream].known, {stream, at})) continue;
      races.push_back(c10::str("memory of ", name_of(block->stream), ", used on ", name_of(stream), " and last written by ", block->writer,
                               ", was freed before the use was over: call record_stream, or let its own stream wait"));
      raced = true;
    }
  }
  if (raced) std::memset(block->host.mutable_data(), 0xFF, block->size);
}

c10::DataPtr make_block(c10::Storage host, int device) {
  auto n = host.nbytes();
  c10::Device where(TYPE, static_cast<c10::DeviceIndex>(device));
  if (!n) return {nullptr, where};
  auto& m = memory[device];
  auto mib = [](double bytes) { return c10::str(std::fixed, std::setprecision(2), bytes / (1 << 20), " MiB"); };
  std::lock_guard<std::mutex> lock(mutex);
  if (m.allocated + n > m.limit) {
    m.n_ooms++;
    TORCH_CHECK_WITH(OutOfMemoryError, false, "twin out of memory. Tried to allocate ", mib(n), ". Device ", device, " has a total capacity of ",
                     mib(m.limit), " of which ", mib(double(m.limit) - double(std::min(m.limit, m.allocated))), " is free.");
  }
  m.allocated += n;
  m.peak = std::max(m.peak, m.allocated);
  m.n_blocks++;
  auto data = host.mutable_data();
  return {data, new Block{std::move(host), n, device, current_stream(device)}, &free_block, where};
}
c10::Storage host_storage(size_t n) {
  c10::Storage host(c10::Storage::use_byte_size_t(), n, c10::GetCPUAllocator()->allocate(n), c10::GetCPUAllocator(), true);
  if (n) std::memset(host.mutable_data(), 0xFF, n);  // what nobody has written is NaN, -1, 255
  return host;
}
Block* block_of(const c10::Storage& s) {
  auto& data = s.data_ptr();
  return data.get_deleter() == &free_block ? static_cast<Block*>(data.get_context()) : nullptr;
}

struct Allocator final : c10::DeviceAllocator {
  c10::DataPtr allocate(size_t n) override { return make_block(host_storage(n), current_device); }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, std::size_t n) const override { std::memcpy(to, from, n); }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t = {0, 0}) override {}
  void recordStream(const c10::DataPtr& data, c10::Stream s) override {
    if (data.get_deleter() != &free_block) return;
    std::lock_guard<std::mutex> lock(mutex);
    static_cast<Block*>(data.get_context())->recorded.insert(index_of(s));
  }
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex d) override {
    std::lock_guard<std::mutex> lock(mutex);
    auto& m = memory[device_or_current(d)];
    c10::CachingDeviceAllocator::DeviceStats stats;
    for (auto* kind : {&stats.allocated_bytes, &stats.reserved_bytes, &stats.active_bytes, &stats.requested_bytes})
      for (auto& stat : *kind) { stat.current = m.allocated; stat.peak = m.peak; }
    for (auto& stat : stats.allocation) stat.current = m.n_blocks;
    stats.num_ooms = m.n_ooms;
    return stats;
  }
  void resetAccumulatedStats(c10::DeviceIndex) override {}
  void resetPeakStats(c10::DeviceIndex d) override {
    std::lock_guard<std::mutex> lock(mutex);
    auto& m = memory[device_or_current(d)];
    m.peak = m.allocated;
  }
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex d) override {
    std::lock_guard<std::mutex> lock(mutex);
    auto& m = memory[device_or_current(d)];
    return {m.limit - std::min(m.limit, m.allocated), m.limit};
  }
};
auto& allocator = *new Allocator;

auto& pinned = *new std::unordered_set<const void*>;
void unpin(void* p) {
  { std::lock_guard<std::mutex> lock(mutex); pinned.erase(p); }
  std::free(p);
}
struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    void* p = n ? std::aligned_alloc(64, (n + 63) / 64 * 64) : nullptr;
    if (p) { std::lock_guard<std::mutex> lock(mutex); pinned.insert(p); }
    return {p, p, &unpin, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &unpin; }
  void copy_data(void* to, const void* from, std::size_t n) const override { std::memcpy(to, from, n); }
};
auto& pinned_allocator = *new PinnedAllocator;
bool is_pinned(const void* p) { std::lock_guard<std::mutex> lock(mutex); return p && pinned.count(p); }

// An operation of a stream: it must be ordered after those that wrote what it uses, and what was late for it arrives now.
struct Use { Block* block; bool writes; };
Mark launch(int stream, const std::string& op, const std::vector<Use>& uses, bool now = true) {
  Mark mark;
  std::string race;
  Clock known;
  {
    std::lock_guard<std::mutex> lock(mutex);
    auto& state = streams[stream];
    auto check = [&](const Use& use, const char* did, const std::string& who, Mark other) {
      if (race.empty() && other.stream >= 0 && other.stream != stream && !over(state.known, other))
        race = c10::str("race: ", op, " on ", name_of(stream), use.writes ? " writes" : " reads", " memory that ", who, did, " on ", name_of(other.stream),
                        ", and has not waited for it (wait_stream, wait_event or work.wait() is missing)");
    };
    if (checks_races) for (auto& use : uses) if (use.block) {
      check(use, " wrote", use.block->writer, use.block->written);
      if (use.writes) for (auto& [other, at] : use.block->reads) check(use, " an operation reads", "", {other, at});
    }
    if (race.empty()) {
      mark = {stream, ++state.launched};
      state.known[stream] = mark.at;
      for (auto& use : uses) if (use.block) {
        use.block->uses[stream] = mark.at;
        if (use.writes) { use.block->written = mark; use.block->writer = op; use.block->reads.clear(); }
        else use.block->reads[stream] = mark.at;
      }
    }
    known = state.known;
  }
  TORCH_CHECK(race.empty(), race);
  if (now) catch_up(known);
  return mark;
}
void later(Mark mark, std::function<void()> run, std::vector<const void*> writes) {
  auto task = std::make_shared<Task>(Task{mark, std::move(run), std::move(writes)});
  std::lock_guard<std::mutex> lock(mutex);
  tasks.push_back(std::move(task));
}

// ------------------------------------------------------------------------------------------------------- guard, generators, hooks
struct Guard final : c10::impl::DeviceGuardImplInterface {
  static int checked(c10::Device d) {
    TORCH_CHECK(d.index() < n_devices, "twin: there is no device ", d.index(), ", only ", n_devices, ": invalid device ordinal");
    return device_or_current(d.index());
  }
  static c10::Stream stream(int device) { return make_stream(device, current_id(device)); }
  c10::DeviceType type() const override { return TYPE; }
  c10::Device getDevice() const override { return {TYPE, static_cast<c10::DeviceIndex>(current_device)}; }
  c10::Device exchangeDevice(c10::Device d) const override { auto old = getDevice(); setDevice(d); return old; }
  void setDevice(c10::Device d) const override { current_device = checked(d); }
  void uncheckedSetDevice(c10::Device d) const noexcept override { current_device = device_or_current(d.index()); }
  c10::DeviceIndex deviceCount() const noexcept override { return static_cast<c10::DeviceIndex>(n_devices); }
  c10::Stream getStream(c10::Device d) const override { return stream(checked(d)); }
  c10::Stream getDefaultStream(c10::Device d) const override { return make_stream(checked(d), 0); }
  c10::Stream getStreamFromGlobalPool(c10::Device d, bool = false) const override {
    std::lock_guard<std::mutex> lock(mutex);
    return make_stream(checked(d), 1 + next_in_pool[checked(d)]++ % POOL);
  }
  c10::Stream getNewStream(c10::Device d, int) const override { return getStreamFromGlobalPool(d); }
  c10::Stream exchangeStream(c10::Stream s) const override {
    auto old = getStream(s.device());
    current_id(checked(s.device())) = s.id();
    return old;
  }
  void* getStreamNativeHandle(const c10::Stream s) const override { return reinterpret_cast<void*>(s.id()); }

  void record(void** event, const c10::Stream& s, const c10::DeviceIndex, const c10::EventFlag flag) const override {
    if (!*event) *event = new Event;
    auto e = static_cast<Event*>(*event);
    std::lock_guard<std::mutex> lock(mutex);
    auto& state = streams[index_of(s)];
    state.known[index_of(s)] = ++state.launched;  // an event is an operation of its own
    *e = Event{state.known, true, false, flag == c10::EventFlag::BACKEND_DEFAULT, std::chrono::steady_clock::now()};
  }
  void block(void* event, const c10::Stream& s) const override {
    if (!event) return;
    std::lock_guard<std::mutex> lock(mutex);
    join(streams[index_of(s)].known, static_cast<Event*>(event)->known);
  }
  // The device is always behind: the first look at an event finds it open, the second one closed.
  bool queryEvent(void* event) const override {
    auto e = static_cast<Event*>(event);
    if (!e || !e->recorded || is_over_for_host(e->known)) return true;
    if (!e->asked) { e->asked = true; return false; }
    host_catches_up(e->known);
    return true;
  }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override { delete static_cast<Event*>(event); }
  bool queryStream(const c10::Stream& s) const override {
    auto known = known_to(index_of(s));
    if (is_over_for_host(known)) return true;
    {
      std::lock_guard<std::mutex> lock(mutex);
      auto& state = streams[index_of(s)];
      if (state.asked != state.launched) { state.asked = state.launched; return false; }
    }
    host_catches_up(known);
    return true;
  }
  void synchronizeStream(const c10::Stream& s) const override { host_waits("synchronize", "stream"); host_catches_up(known_to(index_of(s))); }
  void synchronizeEvent(void* event) const override {
    host_waits("synchronize", "event");
    if (event) host_catches_up(static_cast<Event*>(event)->known);
  }
  void synchronizeDevice(const c10::DeviceIndex d) const override {
    host_waits("synchronize", "device");
    for (int i = 0; i < PER_DEVICE; i++) host_catches_up(known_to(device_or_current(d) * PER_DEVICE + i));
  }
  void recordDataPtrOnStream(const c10::DataPtr& data, const c10::Stream& s) const override { allocator.recordStream(data, s); }
  double elapsedTime(void* start, void* end, const c10::DeviceIndex) const override {
    auto a = static_cast<Event*>(start), b = static_cast<Event*>(end);
    TORCH_CHECK(a && b && a->timed && b->timed, "Both events must be recorded and have enable_timing=True");
    TORCH_CHECK(is_over_for_host(a->known) && is_over_for_host(b->known), "twin error: device not ready: synchronize with the events first");
    return std::chrono::duration<double, std::milli>(b->when - a->when).count();
  }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

struct Generator final : c10::GeneratorImpl {  // the CPU's algorithm in a state of the device's own
  at::Generator engine;
  explicit Generator(int device, at::Generator e = at::detail::createCPUGenerator())
    : GeneratorImpl(c10::Device(TYPE, static_cast<c10::DeviceIndex>(device)), DispatchKeySet(DispatchKey::PrivateUse1)), engine(std::move(e)) {}
  void set_current_seed(uint64_t seed) override { engine.set_current_seed(seed); }
  void set_offset(uint64_t) override { TORCH_CHECK(false, "twin: generators have no offset"); }
  uint64_t get_offset() const override { TORCH_CHECK(false, "twin: generators have no offset"); }
  uint64_t current_seed() const override { return engine.current_seed(); }
  uint64_t seed() override { return const_cast<at::Generator&>(engine).seed(); }
  void set_state(const c10::TensorImpl& state) override { engine.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return engine.unsafeGetGeneratorImpl()->get_state(); }
  Generator* clone_impl() const override { return new Generator(device().index(), engine.clone()); }
};
const at::Generator& default_generator(int device) {
  static auto& all = *[] {
    auto v = new std::vector<at::Generator>;
    for (int d = 0; d < n_devices; d++) v->push_back(at::make_generator<Generator>(d));
    return v;
  }();
  return all.at(device_or_current(device));
}
at::Generator engine_of(const at::Generator& g) { return static_cast<Generator*>(g.unsafeGetGeneratorImpl())->engine; }

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  void init() const override {}
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return static_cast<c10::DeviceIndex>(n_devices); }
  void setCurrentDevice(c10::DeviceIndex d) const override { Guard().setDevice({TYPE, d}); }
  c10::DeviceIndex getCurrentDevice() const override { return static_cast<c10::DeviceIndex>(current_device); }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex d) const override { return Guard().exchangeDevice({TYPE, d}).index(); }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex d) const override { return exchangeDevice(d); }
  bool isPinnedPtr(const void* p) const override { return is_pinned(p); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex d) const override { return default_generator(d); }
  at::Generator getNewGenerator(c10::DeviceIndex d) const override { return at::make_generator<Generator>(device_or_current(d)); }
  void resizePrivateUse1Bytes(const c10::Storage& s, size_t n) const override {
    auto fresh = host_storage(n);
    auto device = s.device().index();
    auto old = block_of(s);
    auto data = make_block(fresh, device);
    launch(current_stream(device), "resize_", {{old, false}, {n ? static_cast<Block*>(data.get_context()) : nullptr, true}});
    if (old && n) std::memcpy(fresh.mutable_data(), old->host.data(), std::min(n, old->size));
    s.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(data));
    s.unsafeGetStorageImpl()->set_nbytes(n);
  }
};

// ------------------------------------------------------------------------------------------- one tensor, seen from the device and the host
bool is_twin(const Tensor& t) { return t.defined() && t.device().type() == TYPE; }
Block* block_of(const Tensor& t) { return is_twin(t) && t.layout() == c10::kStrided ? block_of(t.storage()) : nullptr; }
std::string words(const Tensor& t) { return c10::str(t.dtype(), t.sizes()); }

void check_float64(c10::ScalarType dtype) {
  TORCH_CHECK_TYPE(has_float64 || (dtype != c10::kDouble && dtype != c10::kComplexDouble),
                   "Cannot convert a twin Tensor to float64 dtype as this device doesn't support float64. Please use float32 instead.");
}
void copy_geometry(const Tensor& from, const Tensor& to) {
  to.unsafeGetTensorImpl()->set_sizes_and_strides(from.sizes(), from.strides(), from.storage_offset());
}

Tensor on_host(const Tensor& t) {       // the same memory as a CPU tensor
  auto block = block_of(t.storage());
  auto r = at::detail::make_tensor<c10::TensorImpl>(block ? c10::Storage(block->host) : host_storage(0), DispatchKeySet(DispatchKey::CPU), t.dtype());
  copy_geometry(t, r);
  if (t.unsafeGetTensorImpl()->is_wrapped_number()) r.unsafeGetTensorImpl()->set_wrapped_number(true);
  if (t.is_conj()) r._set_conj(true);
  if (t.is_neg()) r._set_neg(true);
  return r;
}
Tensor on_device(c10::Storage storage, const Tensor& t) {  // a view of device memory with t's geometry
  auto r = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), DispatchKeySet(DispatchKey::PrivateUse1), t.dtype());
  copy_geometry(t, r);
  if (t.unsafeGetTensorImpl()->is_wrapped_number()) r.unsafeGetTensorImpl()->set_wrapped_number(true);
  return r;
}
at::SparseTensorImpl* sparse_impl(const Tensor& t) { return static_cast<at::SparseTensorImpl*>(t.unsafeGetTensorImpl()); }
Tensor make_sparse(DispatchKey key, const Tensor& like, const Tensor& indices, const Tensor& values) {
  auto r = at::detail::make_tensor<at::SparseTensorImpl>(DispatchKeySet(key), like.dtype());
  sparse_impl(r)->resize_(sparse_impl(like)->sparse_dim(), sparse_impl(like)->dense_dim(), like.sizes());
  sparse_impl(r)->set_indices_and_values_unsafe(indices, values);
  sparse_impl(r)->set_coalesced(sparse_impl(like)->coalesced());
  return r;
}

// ------------------------------------------------------------------------------- every operator: the CPU's kernel on the same memory
// Where CUDA's kernels make the host wait, as their result's shape or the way to go on depends on the data.
const std::set<std::string> WAITING = {"nonzero", "masked_select", "equal", "_unique", "_unique2", "unique_dim", "unique_consecutive",
  "unique_dim_consecutive", "bincount", "multinomial", "histc", "is_nonzero", "_coalesce", "nonzero_numpy", "embedding_renorm_",
  "_ctc_loss", "_nested_tensor_from_mask", "segment_reduce", "_assert_scalar", "linalg_eig", "_linalg_eigvals", "geqrf", "linalg_lstsq"};

struct Call {                           // one call of an operator: its tensors as the device and as the host have them
  const c10::FunctionSchema& schema;
  std::string name;
  std::vector<std::pair<Tensor, Tensor>> twins;
  std::vector<Use> uses;
  int device = -1;
  bool sparse = false, by_mask = false, copies_indices = false;
  std::optional<c10::Device> foreign;

  void refuse(const std::string& a, const std::string& b) {
    TORCH_CHECK(false, "Expected all tensors to be on the same device, but found at least two devices, ", a, " and ", b, "! (when checking arguments of ",
                schema.name(), ")");
  }
  Tensor swap(const Tensor& t, bool writes, bool in_list) {
    if (!t.defined()) return t;
    if (!is_twin(t)) {
      if (t.device().is_cpu() && (t.dim() > 0 || writes || in_list)) foreign = t.device();
      return t;
    }
    if (device < 0) device = t.device().index();
    if (device != t.device().index()) refuse(c10::str("twin:", device), t.device().str());
    if (t.layout() == c10::kSparse) {
      sparse = true;
      auto i = swap(sparse_impl(t)->indices(), writes, false), v = swap(sparse_impl(t)->values(), writes, false);
      twins.emplace_back(t, make_sparse(DispatchKey::SparseCPU, t, i, v));
    } else {
      uses.push_back({block_of(t), writes});
      twins.emplace_back(t, on_host(t));
    }
    return twins.back().second;
  }
  void swap_argument(c10::IValue& v, const c10::Argument& a) {
    bool writes = a.alias_info() && a.alias_info()->isWrite();
    auto type = a.type();
    if (auto optional = type->cast<c10::OptionalType>()) type = optional->getElementType();
    if (v.isTensor()) v = swap(v.toTensor(), writes, false);
    else if (v.isTensorList()) {
      auto list = v.toTensorVector();
      for (auto& t : list) t = swap(t, writes, true);
      v = c10::IValue(std::move(list));
    } else if (v.isOptionalTensorList()) {  // indices: CUDA brings those of the CPU to the device
      c10::List<std::optional<Tensor>> list;
      for (std::optional<Tensor> t : v.toOptionalTensorList()) {
        if (t && t->defined() && (t->scalar_type() == at::kBool || t->scalar_type() == at::kByte)) by_mask = true;
        if (t && t->defined() && t->device().is_cpu()) copies_indices = true;
        list.push_back(t && is_twin(*t) ? std::optional<Tensor>(swap(*t, false, false)) : t);
      }
      v = c10::IValue(std::move(list));
    } else if (v.isDevice() && v.toDevice().type() == TYPE) {
      if (device < 0) device = Guard::checked(v.toDevice());
      v = c10::IValue(c10::Device(c10::kCPU));
    } else if (a.name() == "layout" && v.isInt() && v.toLayout() == c10::kSparse) sparse = true;
  }
  void swap_generator(c10::IValue& v, const c10::Argument& a) {
    auto type = a.type();
    if (auto optional = type->cast<c10::OptionalType>()) type = optional->getElementType();
    if (type->kind() != c10::TypeKind::GeneratorType) return;
    auto g = v.isNone() ? default_generator(device) : v.toGenerator();
    TORCH_CHECK(g.device().type() == TYPE, "Expected a 'twin' device type for generator but found '", g.device().type(), "'");
    v = c10::IValue(engine_of(g));
    draws_by_itself = false;
  }
  bool draws_by_itself = false;

  Tensor adopt(const Tensor& t, const std::string& writer, Mark mark) {  // a result of the CPU's
    check_float64(t.scalar_type());
    auto data = make_block(t.storage(), device);
    if (auto block = static_cast<Block*>(data.get_context())) {
      block->written = mark;
      block->writer = writer;
      block->uses[mark.stream] = mark.at;
    }
    return on_device(c10::Storage(c10::Storage::use_byte_size_t(), t.storage().nbytes(), std::move(data), &allocator, true), t);
  }
  Tensor back(const Tensor& t, Mark mark) {
    if (!t.defined() || !t.device().is_cpu()) return t;
    for (auto& [dev, host] : twins) if (host.unsafeGetTensorImpl() == t.unsafeGetTensorImpl()) return dev;
    if (t.layout() == c10::kSparse)
      return make_sparse(DispatchKey::SparsePrivateUse1, t, back(sparse_impl(t)->indices(), mark), back(sparse_impl(t)->values(), mark));
    for (auto& [dev, host] : twins)
      if (host.layout() == c10::kStrided && host.storage().unsafeGetStorageImpl() == t.storage().unsafeGetStorageImpl()) return on_device(dev.storage(), t);
    auto r = adopt(t, schema.name(), mark);
    twins.emplace_back(r, t);           // results that share memory go on doing so
    return r;
  }
  // Operators with out=, and those of sparse tensors, give their arguments new shapes or memory.
  void take_changes(Mark mark) {
    for (size_t i = 0, n = twins.size(); i < n; i++) {
      auto [dev, host] = twins[i];
      if (host.layout() == c10::kSparse) {
        sparse_impl(dev)->resize_(sparse_impl(host)->sparse_dim(), sparse_impl(host)->dense_dim(), host.sizes());
        sparse_impl(dev)->set_indices_and_values_unsafe(back(sparse_impl(host)->indices(), mark), back(sparse_impl(host)->values(), mark));
        sparse_impl(dev)->set_coalesced(sparse_impl(host)->coalesced());
        continue;
      }
      auto storage = dev.storage();
      if (host.storage().nbytes() != storage.nbytes() || host.storage().data() != storage.data()) {
        auto fresh = adopt(host, schema.name(), mark).storage();
        storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(fresh.unsafeGetStorageImpl()->mutable_data_ptr()));
        storage.unsafeGetStorageImpl()->set_nbytes(host.storage().nbytes());
      }
      if (host.sizes() != dev.sizes() || host.strides() != dev.strides() || host.storage_offset() != dev.storage_offset()) copy_geometry(host, dev);
    }
  }
};

bool is_view(const c10::FunctionSchema& schema) {  // touches no data
  for (auto& a : schema.arguments()) if (a.alias_info() && a.alias_info()->isWrite()) return false;
  for (auto& r : schema.returns()) if (r.alias_info()) return true;
  return false;
}

void run_on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  auto& schema = op.schema();
  auto n = schema.arguments().size(), begin = stack->size() - n;
  Call call{schema, schema.name().substr(schema.name().rfind(':') + 1)};
  for (size_t i = 0; i < n; i++) call.swap_argument((*stack)[begin + i], schema.arguments()[i]);
  call.device = device_or_current(call.device);
  if (call.foreign) call.refuse(c10::str("twin:", call.device), call.foreign->str());
  call.draws_by_itself = op.hasTag(at::Tag::nondeterministic_seeded);
  for (size_t i = 0; i < n; i++) call.swap_generator((*stack)[begin + i], schema.arguments()[i]);

  bool waits = WAITING.count(call.name) || call.by_mask;
  if (call.name == "repeat_interleave") waits = begin + 1 < stack->size() && (*stack)[begin + 1].isNone();
  if (call.by_mask && call.name.find("index_put") != std::string::npos && (*stack)[begin + 2].toTensor().dim() == 0)
    waits = false;                      // x[mask] = number is a masked_fill on CUDA
  if (call.copies_indices) host_waits("host to device", call.name);
  if (waits) host_waits("op", call.name);

  auto stream = current_stream(call.device);
  Mark mark{stream, 0};
  if (!is_view(schema)) mark = launch(stream, schema.name(), call.uses);
  if (waits || call.copies_indices) host_catches_up(known_to(stream));

  auto keys = DispatchKeySet(DispatchKey::CPU);
  if (call.sparse) keys = keys | DispatchKeySet(DispatchKey::SparseCPU);
  {
    at::AutoDispatchBelowADInplaceOrView no_autograd;
    c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    Tensor saved;                       // operators without a generator= draw from the CPU's default one: lend them the device's state
    auto cpu = at::detail::getDefaultCPUGenerator();
    if (call.draws_by_itself) { saved = cpu.get_state(); cpu.set_state(engine_of(default_generator(call.device)).get_state()); }
    auto give_back = [&] {
      if (!saved.defined()) return;
      engine_of(default_generator(call.device)).set_state(cpu.get_state());
      cpu.set_state(saved);
    };
    try { op.redispatchBoxed(keys, stack); } catch (...) { give_back(); throw; }
    give_back();
  }
  call.take_changes(mark);
  auto first = stack->size() - schema.returns().size();
  for (size_t i = first; i < stack->size(); i++) {
    auto& v = (*stack)[i];
    if (v.isTensor()) v = call.back(v.toTensor(), mark);
    else if (v.isTensorList()) {
      auto list = v.toTensorVector();
      for (auto& t : list) t = call.back(t, mark);
      v = c10::IValue(std::move(list));
    }
  }
}
void fallback(const c10::OperatorHandle& op, DispatchKeySet, torch::jit::Stack* stack) { run_on_host(op, stack); }

// Convolutions of backends outside of torch go through operators of their own.
void convolution(const c10::OperatorHandle&, DispatchKeySet, torch::jit::Stack* stack) {
  static auto op = c10::Dispatcher::singleton().findSchemaOrThrow("aten::convolution", "");
  run_on_host(op, stack);
}
void convolution_backward(const c10::OperatorHandle&, DispatchKeySet, torch::jit::Stack* stack) {
  static auto op = c10::Dispatcher::singleton().findSchemaOrThrow("aten::convolution_backward", "");
  auto begin = stack->end() - 10;
  auto bias = stack->back().toBoolList()[2] ? c10::IValue(std::vector<int64_t>{begin->toTensor().size(1)}) : c10::IValue();
  stack->insert(begin + 3, bias);
  run_on_host(op, stack);
}

// ---------------------------------------------------------------------------------------------- operators that a backend has itself
Tensor empty_memory_format(c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout> layout,
                           std::optional<at::Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  TORCH_CHECK(c10::layout_or_default(layout) == c10::kStrided, "twin: empty() makes strided tensors only");
  check_float64(c10::dtype_or_default(dtype));
  c10::DeviceGuard guard(device && device->has_index() ? *device : Guard().getDevice());
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &allocator, DispatchKeySet(DispatchKey::PrivateUse1), c10::dtype_or_default(dtype), format);
}
Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                     std::optional<at::Device> device, std::optional<bool>) {
  check_float64(c10::dtype_or_default(dtype));
  c10::DeviceGuard guard(device && device->has_index() ? *device : Guard().getDevice());
  return at::detail::empty_strided_generic(size, stride, &allocator, DispatchKeySet(DispatchKey::PrivateUse1), c10::dtype_or_default(dtype));
}

bool lies_pinned(const Tensor& t) { return t.storage().nbytes() && is_pinned(t.storage().data()); }
void poison(const Tensor& host) {
  auto p = at::empty(host.sizes(), host.options().pinned_memory(false));
  if (p.numel()) std::memset(p.mutable_data_ptr(), 0xFF, p.nbytes());
  host.copy_(p);
}
Tensor bare(const Tensor& t) {          // without a Python object, so that it may be dropped anywhere
  auto r = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(t.storage()), DispatchKeySet(DispatchKey::CPU), t.dtype());
  copy_geometry(t, r);
  return r;
}
uint64_t hash_of(const Tensor& t) {
  auto c = t.contiguous();
  return std::hash<std::string_view>()({static_cast<const char*>(c.const_data_ptr()), c.nbytes()});
}
using Weak = c10::weak_intrusive_ptr<c10::StorageImpl>;
Weak weak(const Tensor& t) { return Weak(c10::intrusive_ptr<c10::StorageImpl>::reclaim_copy(t.storage().unsafeGetStorageImpl())); }
void land_later(Mark mark, const Tensor& host, std::function<void()> run) {
  std::lock_guard<std::mutex> lock(mutex);
  landings.push_back({mark, std::move(run), host.storage().unsafeGetStorageImpl()});
}

// Pinned memory -> device, at the stream's time. The host may change the source only when it knows that the copy is over.
void upload_later(const Tensor& source, const Tensor& target, int stream, Mark mark) {
  auto to = on_host(target);
  poison(to);
  bool staged = !lies_pinned(source) || !source.is_contiguous();  // pageable memory is copied to a staging buffer first
  auto from = staged ? source.clone() : bare(source);
  later(mark, [=] {
    at::AutoDispatchBelowADInplaceOrView no_autograd;
    std::list<Landing> due;             // the source may itself be waiting for bytes of the device
    {
      std::lock_guard<std::mutex> lock(mutex);
      for (auto it = landings.begin(); it != landings.end();) {
        auto next = std::next(it);
        if (it->into == from.storage().unsafeGetStorageImpl() && over(streams[stream].known, it->mark)) due.splice(due.end(), landings, it);
        it = next;
      }
    }
    for (auto& landing : due) landing.run();
    to.copy_(from);
    if (staged) return;
    auto read = hash_of(from);
    land_later(mark, from, [=, geometry = from.sizes().vec(), kind = from.dtype(), offset = from.storage_offset(), still = weak(from)]() mutable {
      auto storage = still.lock();
      if (!storage) return;
      auto now = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(storage), DispatchKeySet(DispatchKey::CPU), kind);
      now.unsafeGetTensorImpl()->set_sizes_contiguous(geometry);
      now.unsafeGetTensorImpl()->set_storage_offset(offset);
      if (hash_of(now) == read) return;
      std::lock_guard<std::mutex> lock(mutex);
      races.push_back(c10::str("pinned memory was changed while a copy of it on ", name_of(mark.stream), " was perhaps not over"));
    });
  }, {to.storage().unsafeGetStorageImpl()});
}
// Device -> pinned memory: read at the stream's time, and there when the host has waited.
void download_later(const Tensor& source, const Tensor& target, Mark mark) {
  poison(target);
  auto from = on_host(source), to = bare(target);
  auto bytes = std::make_shared<Tensor>();
  later(mark, [=] {
    at::AutoDispatchBelowADInplaceOrView no_autograd;
    *bytes = from.to(to.scalar_type(), /*non_blocking=*/false, /*copy=*/true);
  }, {});
  land_later(mark, target, [=] {
    at::AutoDispatchBelowADInplaceOrView no_autograd;
    if (bytes->defined()) to.copy_(*bytes);
  });
}

Tensor copy_from(const Tensor& self, const Tensor& dst, bool non_blocking) {
  at::AutoDispatchBelowADInplaceOrView no_autograd;
  if (!dst.numel() || self.is_same(dst)) return dst;
  if (is_twin(self) && is_twin(dst)) {
    auto from = current_stream(self.device().index()), to = current_stream(dst.device().index());
    if (from != to) {                   // as CUDA does it: the source's stream copies, and both wait for each other
      std::lock_guard<std::mutex> lock(mutex);
      join(streams[from].known, streams[to].known);
    }
    launch(from, "copy_", {{block_of(self), false}, {block_of(dst), true}});
    on_host(dst).copy_(on_host(self));
    if (from != to) {
      std::lock_guard<std::mutex> lock(mutex);
      join(streams[to].known, streams[from].known);
    }
  } else if (is_twin(dst)) {
    TORCH_CHECK(self.device().is_cpu(), "twin: no copies from ", self.device());
    auto stream = current_stream(dst.device().index());
    if (!non_blocking) host_waits("host to device", words(self));
    auto mark = launch(stream, "copy_", {{block_of(dst), true}});
    if (non_blocking) upload_later(self, dst, stream, mark);
    else { on_host(dst).copy_(self); host_catches_up(known_to(stream)); }
  } else {
    TORCH_CHECK(dst.device().is_cpu(), "twin: no copies to ", dst.device());
    auto stream = current_stream(self.device().index());
    bool late = non_blocking && lies_pinned(dst) && dst.is_contiguous();
    if (!late) host_waits("device to host", words(self));
    auto mark = launch(stream, "copy_", {{block_of(self), false}});
    if (late) download_later(self, dst, mark);
    else { host_catches_up(known_to(stream)); dst.copy_(on_host(self)); }
  }
  return dst;
}
Tensor copy_sparse(const Tensor& self, const Tensor& dst, bool non_blocking) {  // indices and values, each as a dense tensor
  TORCH_CHECK(self.is_sparse() && dst.is_sparse(), "twin: a copy between a sparse and a dense tensor: call to_dense() or to_sparse() first");
  auto from = sparse_impl(self), to = sparse_impl(dst);
  to->resize_(from->sparse_dim(), from->dense_dim(), self.sizes());
  auto indices = from->indices().to(dst.device(), at::kLong, non_blocking, /*copy=*/true);
  to->set_indices_and_values_unsafe(indices, from->values().to(dst.device(), dst.scalar_type(), non_blocking, /*copy=*/true));
  to->set_coalesced(from->coalesced());
  return dst;
}
Tensor copy_from_and_resize(const Tensor& self, const Tensor& dst) { dst.resize_(self.sizes()); return copy_from(self, dst, false); }
at::Scalar local_scalar(const Tensor& t) {
  host_waits("item", words(t));
  launch(current_stream(t.device().index()), "item", {{block_of(t), false}});
  host_catches_up(known_to(current_stream(t.device().index())));
  return on_host(t).item();
}

const Tensor& resize_(const Tensor& self, c10::SymIntArrayRef size, std::optional<at::MemoryFormat> format) {
  auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  auto impl = self.unsafeGetTensorImpl();
  size_t need = (c10::multiply_integers(sizes) + self.storage_offset()) * self.itemsize();
  if (need > self.storage().nbytes()) at::detail::getPrivateUse1Hooks().resizePrivateUse1Bytes(self.storage(), need);
  if (self.sizes() != sizes) impl->set_sizes_contiguous(sizes);
  if (format && *format != at::MemoryFormat::Preserve) impl->empty_tensor_restride(*format);
  return self;
}
Tensor& set_storage(Tensor& result, at::Storage storage, int64_t offset, c10::IntArrayRef size, c10::IntArrayRef stride) {
  auto impl = result.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(storage));
  if (!stride.empty() || size.empty()) { impl->set_sizes_and_strides(size, stride, offset); return result; }
  impl->set_storage_offset(offset);
  impl->set_sizes_contiguous(size);
  return result;
}
Tensor& set_source(Tensor& result, at::Storage s) { int64_t n = s.nbytes() / result.itemsize(); return set_storage(result, s, 0, {n}, {1}); }
Tensor& set_tensor(Tensor& result, const Tensor& o) { return set_storage(result, o.storage(), o.storage_offset(), o.sizes(), o.strides()); }
Tensor& set_nothing(Tensor& result) { return set_tensor(result, at::empty({0}, result.options())); }
Tensor as_strided(const Tensor& t, c10::IntArrayRef s, c10::IntArrayRef r, std::optional<int64_t> o) { return at::native::as_strided_tensorimpl(t, s, r, o); }
void record_stream(Tensor& t, at::Stream s) { allocator.recordStream(t.storage().data_ptr(), s); }

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }
TORCH_LIBRARY_IMPL(_, SparsePrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }
TORCH_LIBRARY_IMPL(aten, SparsePrivateUse1, m) {
  m.impl("_copy_from", TORCH_FN(copy_sparse));
  auto& dispatcher = c10::Dispatcher::singleton();
  for (auto& name : dispatcher.getAllOpNames())  // a fallback comes after the general kernels that some of these have for dense tensors
    if (name.name.rfind("aten::", 0) == 0 && name.name != "aten::copy_" && dispatcher.findOp(name)->hasKernelForDispatchKey(DispatchKey::SparseCPU))
      m.impl(c10::toString(name).c_str(), torch::CppFunction::makeFromBoxedFunction<&fallback>());
}
TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", TORCH_FN(empty_memory_format));
  m.impl("empty_strided", TORCH_FN(empty_strided));
  m.impl("_copy_from", TORCH_FN(copy_from));
  m.impl("_copy_from_and_resize", TORCH_FN(copy_from_and_resize));
  m.impl("_local_scalar_dense", TORCH_FN(local_scalar));
  m.impl("resize_", TORCH_FN(resize_));
  m.impl("set_.source_Storage_storage_offset", TORCH_FN(set_storage));
  m.impl("set_.source_Storage", TORCH_FN(set_source));
  m.impl("set_.source_Tensor", TORCH_FN(set_tensor));
  m.impl("set_", TORCH_FN(set_nothing));
  m.impl("as_strided", TORCH_FN(as_strided));
  m.impl("view", TORCH_FN(at::native::view));
  m.impl("_reshape_alias", TORCH_FN(at::native::_reshape_alias));
  m.impl("unfold", TORCH_FN(at::native::unfold));
  m.impl("record_stream", TORCH_FN(record_stream));
  m.impl("convolution_overrideable", torch::CppFunction::makeFromBoxedFunction<&convolution>());
  m.impl("convolution_backward_overrideable", torch::CppFunction::makeFromBoxedFunction<&convolution_backward>());
}

Tensor refuse_bce(const Tensor&, const Tensor&, const std::optional<Tensor>&, int64_t) {
  TORCH_CHECK(false, "torch.nn.functional.binary_cross_entropy and torch.nn.BCELoss are unsafe to autocast. Use binary_cross_entropy_with_logits.");
}
// CUDA's lists of what autocast runs in which precision.
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  using at::IntArrayRef;
  using at::Scalar;
  using at::ScalarType;
#define LOWER(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
#define FP32(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
#define FP32_OPT(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32_set_opt_dtype)
#define PROMOTE(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, promote)
  AT_FORALL_LOWER_PRECISION_FP(LOWER)
  AT_FORALL_FP32(FP32)
  AT_FORALL_FP32_SET_OPT_DTYPE(FP32_OPT)
  AT_FORALL_DIFFERENT_REDISPATCH_SIGNATURE(KERNEL_DIFFERENT_REDISPATCH_SIGNATURE_PRIVATEUSEONE)
  AT_FORALL_PROMOTE(PROMOTE)
  m.impl("binary_cross_entropy", TORCH_FN(refuse_bce));
}
}  // namespace

namespace at::native {
int64_t twin_sdp_choice(const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, double, bool, std::optional<double>, bool) {
  return static_cast<int64_t>(at::SDPBackend::math);
}
REGISTER_PRIVATEUSE1_DISPATCH(_fused_sdp_choice_stub, &twin_sdp_choice)
}  // namespace at::native

namespace {
// --------------------------------------------------------------------------------------------------------------------------- twinccl
using Works = c10::intrusive_ptr<c10d::Work>;
using Tensors = std::vector<Tensor>;

struct TwinWork final : c10d::Work {
  Tensors outputs, stash;               // NCCL, too, holds what it uses until somebody has waited
  c10::Stream stream;
  std::shared_ptr<Event> end;
  Works inner;
  bool is_barrier = false;
  c10::intrusive_ptr<c10::ivalue::Future> future;

  TwinWork(Tensors out, Tensors held, c10::Stream s, Works w, c10d::OpType type, int rank)
    : Work(rank, type), outputs(std::move(out)), stash(std::move(held)), stream(s), inner(std::move(w)) {
    void* event = nullptr;
    Guard().record(&event, stream, stream.device_index(), c10::EventFlag::PYTORCH_DEFAULT);
    end.reset(static_cast<Event*>(event));
    future = c10::make_intrusive<c10::ivalue::Future>(c10::ListType::create(c10::TensorType::get()), std::vector<c10::Device>{stream.device()});
    c10::StreamGuard guard(stream);     // the future's event is recorded on the stream of the collective
    future->markCompleted(c10::IValue(outputs));
  }
  ~TwinWork() override { for (auto& t : stash) if (t.defined()) record_stream(t, stream); }
  bool isCompleted() override { return (!inner || inner->isCompleted() || is_over_for_host(end->known)) && Guard().queryEvent(end.get()); }
  bool isSuccess() const override { return true; }
  bool wait(std::chrono::milliseconds) override {
    Guard().block(end.get(), Guard::stream(stream.device_index()));
    if (is_barrier) { host_waits("synchronize", "barrier"); host_catches_up(end->known); }
    stash.clear();
    return true;
  }
  void synchronize() override { wait(kNoTimeout); }
  void blockCurrentStream() override { wait(kNoTimeout); }
  Tensors result() override { return outputs; }
  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override { return future; }
};

struct TwinCCL final : c10d::Backend {
  c10::intrusive_ptr<c10d::Backend> gloo;
  std::map<int, int64_t> own_streams;   // by device
  bool coalescing = false;
  Tensors coalesced;
  int coalesced_device = -1;
  uint64_t n_collectives = 0;
  TwinCCL(c10::intrusive_ptr<c10d::Backend> g, int rank, int size) : Backend(rank, size), gloo(std::move(g)) {}
  const std::string getBackendName() const override { return "twinccl"; }
  uint64_t getSequenceNumberForGroup() override { return n_collectives; }
  void setTimeout(std::chrono::milliseconds timeout) override { gloo->setTimeout(timeout); }
  void abort() override { gloo->abort(); }
  void shutdown() override { gloo->shutdown(); }

  static void check(const Tensors& all) {
    TORCH_CHECK(!all.empty(), "twinccl: Tensor list must be nonempty");
    for (auto& t : all) {
      TORCH_CHECK(is_twin(t) && t.layout() == c10::kStrided, "twinccl: Tensors must be on a twin device and dense, got one on ", t.device());
      TORCH_CHECK(t.device() == all[0].device(), "twinccl: Tensors must be on the same device, got ", all[0].device(), " and ", t.device());
      TORCH_CHECK(t.scalar_type() == all[0].scalar_type(), "twinccl: Tensors must have the same dtype, got ", all[0].dtype(), " and ", t.dtype());
      TORCH_CHECK(t.is_contiguous() || t.is_contiguous(at::MemoryFormat::ChannelsLast) || t.is_contiguous(at::MemoryFormat::ChannelsLast3d),
                  "twinccl: Tensors must be contiguous");
      TORCH_CHECK(t.scalar_type() != at::kShort, "twinccl: Input tensor data type is not supported: ", t.dtype());
    }
  }
  c10::Stream stream_for(int device, bool async) {
    if (!async) return Guard::stream(device);
    if (!own_streams.count(device)) {
      std::lock_guard<std::mutex> lock(mutex);
      own_streams[device] = 1 + POOL + next_comm[device]++ % (PER_DEVICE - 1 - POOL);
    }
    return make_stream(device, own_streams[device]);
  }
  // A collective reads copies of `in` now and fills `out` later, on its stream. `start` begins it on host copies of both and returns gloo's
  // work; `finish` is called when that is done, with the copies of `out`.
  using Start = std::function<Works(Tensors& in, Tensors& out)>;
  using Finish = std::function<void(Tensors& out)>;
  Works run(c10d::OpType type, bool async, const Tensors& in, const Tensors& out, const Start& start, const Finish& finish = nullptr) {
    at::AutoDispatchBelowADInplaceOrView no_autograd;
    auto all = in;
    all.insert(all.end(), out.begin(), out.end());
    check(all);
    auto device = all[0].device().index();
    auto stream = stream_for(device, async || coalescing);
    auto s = index_of(stream), t = current_stream(device);
    std::vector<Use> uses;
    std::vector<const void*> storages;
    for (auto& x : in) uses.push_back({block_of(x), false});
    for (auto& x : out) uses.push_back({block_of(x), true});
    for (auto& use : uses) if (use.block) storages.push_back(use.block->host.unsafeGetStorageImpl());
    {
      std::lock_guard<std::mutex> lock(mutex);
      join(streams[s].known, streams[t].known);
    }
    auto before = known_to(t);
    auto mark = launch(s, "twinccl " + c10d::opTypeToString(type), uses, /*now=*/false);
    catch_up(before);                   // not what the collective's own stream has yet to do: that would wait for the other ranks
    catch_up(known_to(s), &storages);
    Tensors host_in, host_out, targets;
    for (auto& x : in) host_in.push_back(on_host(x).clone(at::MemoryFormat::Preserve));
    for (auto& x : out) {
      targets.push_back(on_host(x));
      host_out.push_back(targets.back().clone(at::MemoryFormat::Preserve));
    }
    Works work;
    {
      WithoutGil no_gil;
      work = start(host_in, host_out);
    }
    for (auto& x : targets) poison(x);
    std::vector<const void*> writes;
    for (auto& x : targets) writes.push_back(x.storage().unsafeGetStorageImpl());
    later(mark, [=]() mutable {
      at::AutoDispatchBelowADInplaceOrView no_autograd;
      if (work) work->wait();
      if (finish) finish(host_out);
      for (size_t i = 0; i < targets.size(); i++) targets[i].copy_(host_out[i]);
      host_in.clear();
    }, writes);
    n_collectives++;
    if (coalescing) {
      coalesced.insert(coalesced.end(), all.begin(), all.end());
      coalesced_device = device;
    }
    return c10::make_intrusive<TwinWork>(out.empty() ? in : out, all, stream, work, type, getRank());
  }

  void startCoalescing() override { coalescing = true; coalesced.clear(); coalesced_device = -1; }
  bool supportsCoalescing() const override { return true; }
  Works endCoalescing() override {
    coalescing = false;
    auto device = device_or_current(coalesced_device);
    auto all = std::move(coalesced);
    coalesced.clear();
    return c10::make_intrusive<TwinWork>(all, all, stream_for(device, true), nullptr, c10d::OpType::COALESCED, getRank());
  }

  // gloo does not know every dtype: what is only moved is moved as bytes, and sums of half precision are made in float32.
  static Tensor bytes(const Tensor& t) { return at::empty({0}, at::kByte).set_(t.storage(), t.storage_offset() * int64_t(t.itemsize()), {int64_t(t.nbytes())}, {1}); }
  static Tensors bytes(const Tensors& all) { Tensors r; for (auto& t : all) r.push_back(bytes(t)); return r; }
  static Tensor flat(const Tensor& t) { return at::empty({0}, t.options()).set_(t.storage(), t.storage_offset(), {t.numel()}, {1}); }
  struct Reduction {                    // how gloo's op and dtype stand for those that were asked for
    c10d::ReduceOp op;
    std::function<Tensor(const Tensor&)> before;
    std::function<Tensor(const Tensor&)> after;
  };
  Reduction reduction(const c10d::ReduceOp& asked, at::ScalarType dtype) const {
    auto wide = dtype == at::kHalf || dtype == at::kBFloat16 ? at::kFloat : dtype == at::kBool ? at::kByte : dtype;
    auto op = asked;
    double factor = 1, divisor = 1;
    if (asked == c10d::ReduceOp::AVG) { op = c10d::ReduceOp::SUM; divisor = getSize(); }
    if (asked == c10d::ReduceOp::PREMUL_SUM) {
      auto* given = static_cast<c10d::PreMulSumSupplement*>(asked.supplement_.get());
      factor = given->tensor_factor.defined() ? given->tensor_factor.item<double>() : given->double_factor;
      op = c10d::ReduceOp::SUM;
    }
    if (dtype == at::kBool && op == c10d::ReduceOp::SUM) op = c10d::ReduceOp::MAX;
    return {op, [=](const Tensor& t) { auto w = flat(t).to(wide, false, true); return factor == 1 ? w : w.mul_(factor); },
            [=](const Tensor& t) { return divisor == 1 ? t : at::isIntegralType(wide, true) ? t.floor_divide(divisor) : t / divisor; }};
  }
  // Reduces the flat host tensors `of`, one collective of gloo each: bits do not depend on what is coalesced.
  template <class Options> Works reduce_all(c10d::OpType type, const Tensors& t, const Options& o, int root = -1) {
    auto r = reduction(o.reduceOp, t.empty() ? at::kFloat : t[0].scalar_type());
    auto wide = std::make_shared<Tensors>();
    auto others = std::make_shared<std::vector<Works>>();
    bool mine = root < 0 || root == getRank();
    return run(type, o.asyncOp, mine ? Tensors{} : t, mine ? t : Tensors{}, [=, this](Tensors& in, Tensors& out) {
      for (auto& x : mine ? out : in) {
        wide->push_back(r.before(x));
        Tensors one{wide->back()};
        if (root < 0) {
          c10d::AllreduceOptions p;
          p.reduceOp = r.op; p.timeout = o.timeout;
          others->push_back(gloo->allreduce(one, p));
        } else {
          c10d::ReduceOptions p;
          p.reduceOp = r.op; p.timeout = o.timeout; p.rootRank = root;
          others->push_back(gloo->reduce(one, p));
        }
      }
      return others->back();
    }, [=, this](Tensors& out) {
      for (auto& w : *others) w->wait();
      for (size_t i = 0; i < out.size(); i++) flat(out[i]).copy_(r.after((*wide)[i]));
    });
  }
  Works allreduce(Tensors& t, const c10d::AllreduceOptions& o) override { return reduce_all(c10d::OpType::ALLREDUCE, t, o); }
  Works allreduce_coalesced(Tensors& t, const c10d::AllreduceCoalescedOptions& o) override { return reduce_all(c10d::OpType::ALLREDUCE_COALESCED, t, o); }
  Works reduce(Tensors& t, const c10d::ReduceOptions& o) override { return reduce_all(c10d::OpType::REDUCE, t, o, static_cast<int>(o.rootRank)); }

  Works broadcast(Tensors& t, const c10d::BroadcastOptions& o) override {
    bool sends = o.rootRank == getRank();
    return run(c10d::OpType::BROADCAST, o.asyncOp, sends ? t : Tensors{}, sends ? Tensors{} : t, [=, this](Tensors& in, Tensors& out) {
      auto b = bytes(sends ? in : out);
      return gloo->broadcast(b, o);
    });
  }
  // Every rank's `in`, one after another in the flat bytes of `out`'s parts.
  Works gather_all(c10d::OpType type, bool async, std::chrono::milliseconds timeout, const Tensors& in, const Tensors& out, bool parts_are_ranks) {
    auto size = getSize();
    auto works = std::make_shared<std::vector<Works>>();
    return run(type, async, in, out, [=, this](Tensors& hin, Tensors& hout) {
      c10d::AllgatherOptions o;
      o.timeout = timeout;
      for (size_t i = 0; i < hin.size(); i++) {
        std::vector<Tensors> to(1);
        if (parts_are_ranks) to[0] = bytes(hout);
        else for (auto& part : bytes(hout[i]).chunk(size)) to[0].push_back(part);
        TORCH_CHECK(int(to[0].size()) == size && to[0][0].numel() == int64_t(hin[i].nbytes()),
                    "twinccl: output tensor size must be equal to world_size times input tensor size");
        Tensors from{bytes(hin[i])};
        works->push_back(gloo->allgather(to, from, o));
      }
      return works->back();
    }, [=, this](Tensors&) { for (auto& w : *works) w->wait(); });
  }
  Works allgather(std::vector<Tensors>& out, Tensors& in, const c10d::AllgatherOptions& o) override {
    return gather_all(c10d::OpType::ALLGATHER, o.asyncOp, o.timeout, in, out.at(0), true);
  }
  Works _allgather_base(Tensor& out, Tensor& in, const c10d::AllgatherOptions& o) override {
    return gather_all(c10d::OpType::_ALLGATHER_BASE, o.asyncOp, o.timeout, {in}, {out}, false);
  }
  Works allgather_into_tensor_coalesced(Tensors& out, Tensors& in, const c10d::AllgatherOptions& o) override {
    return gather_all(c10d::OpType::COALESCED, o.asyncOp, o.timeout, in, out, false);
  }
  // The sum of all, of which each rank keeps its part.
  Works scatter_sums(c10d::OpType type, const Tensors& in, const Tensors& out, const c10d::ReduceScatterOptions& o, bool parts_are_ranks) {
    auto r = reduction(o.reduceOp, in.at(0).scalar_type());
    auto size = getSize(), rank = getRank();
    auto wide = std::make_shared<Tensors>();
    auto works = std::make_shared<std::vector<Works>>();
    return run(type, o.asyncOp, in, out, [=, this](Tensors& hin, Tensors& hout) {
      c10d::AllreduceOptions p;
      p.reduceOp = r.op; p.timeout = o.timeout;
      for (size_t i = 0; i < hout.size(); i++) {
        Tensors flats;
        for (auto& x : hin) flats.push_back(flat(x));
        auto whole = parts_are_ranks ? at::cat(flats) : flats[i];
        TORCH_CHECK(whole.numel() == hout[i].numel() * size, "twinccl: input tensor must be the same size as output size times world size");
        wide->push_back(r.before(whole));
        Tensors one{wide->back()};
        works->push_back(gloo->allreduce(one, p));
      }
      return works->back();
    }, [=, this](Tensors& hout) {
      for (auto& w : *works) w->wait();
      for (size_t i = 0; i < hout.size(); i++) flat(hout[i]).copy_(r.after((*wide)[i].chunk(size)[rank]));
    });
  }
  Works reduce_scatter(Tensors& out, std::vector<Tensors>& in, const c10d::ReduceScatterOptions& o) override {
    return scatter_sums(c10d::OpType::REDUCE_SCATTER, in.at(0), out, o, true);
  }
  Works _reduce_scatter_base(Tensor& out, Tensor& in, const c10d::ReduceScatterOptions& o) override {
    return scatter_sums(c10d::OpType::_REDUCE_SCATTER_BASE, {in}, {out}, o, false);
  }
  Works reduce_scatter_tensor_coalesced(Tensors& out, Tensors& in, const c10d::ReduceScatterOptions& o) override {
    return scatter_sums(c10d::OpType::REDUCE_SCATTER_TENSOR_COALESCED, in, out, o, false);
  }
  Works gather(std::vector<Tensors>& out, Tensors& in, const c10d::GatherOptions& o) override {
    return run(c10d::OpType::GATHER, o.asyncOp, in, out.empty() ? Tensors{} : out[0], [=, this](Tensors& hin, Tensors& hout) {
      std::vector<Tensors> to;
      if (!hout.empty()) to.push_back(bytes(hout));
      auto from = bytes(hin);
      return gloo->gather(to, from, o);
    });
  }
  Works scatter(Tensors& out, std::vector<Tensors>& in, const c10d::ScatterOptions& o) override {
    return run(c10d::OpType::SCATTER, o.asyncOp, in.empty() ? Tensors{} : in[0], out, [=, this](Tensors& hin, Tensors& hout) {
      std::vector<Tensors> from;
      if (!hin.empty()) from.push_back(bytes(hin));
      auto to = bytes(hout);
      return gloo->scatter(to, from, o);
    });
  }
  Works alltoall_base(Tensor& out, Tensor& in, std::vector<int64_t>& out_splits, std::vector<int64_t>& in_splits, const c10d::AllToAllOptions& o) override {
    auto in_bytes = [](const Tensor& t, std::vector<int64_t> splits) {
      for (auto& n : splits) n *= t.dim() && t.size(0) ? t.nbytes() / t.size(0) : t.itemsize();
      return splits;
    };
    auto a = in_bytes(out, out_splits), b = in_bytes(in, in_splits);
    return run(c10d::OpType::ALLTOALL_BASE, o.asyncOp, {in}, {out}, [=, this](Tensors& hin, Tensors& hout) mutable {
      auto to = bytes(hout[0]), from = bytes(hin[0]);
      return gloo->alltoall_base(to, from, a, b, o);
    });
  }
  Works alltoall(Tensors& out, Tensors& in, const c10d::AllToAllOptions& o) override {
    auto whole = std::make_shared<Tensor>();
    auto sizes = [](const Tensors& all) { std::vector<int64_t> r; for (auto& t : all) r.push_back(t.nbytes()); return r; };
    return run(c10d::OpType::ALLTOALL, o.asyncOp, in, out, [=, this](Tensors& hin, Tensors& hout) {
      auto a = sizes(hout), b = sizes(hin);
      auto from = at::cat(bytes(hin));
      *whole = at::cat(bytes(hout));
      return gloo->alltoall_base(*whole, from, a, b, o);
    }, [=, this](Tensors& hout) {
      auto parts = whole->split_with_sizes(sizes(hout));
      for (size_t i = 0; i < hout.size(); i++) bytes(hout[i]).copy_(parts[i]);
    });
  }
  Works send(Tensors& t, int to, int tag) override {
    return run(c10d::OpType::SEND, true, t, {}, [=, this](Tensors& in, Tensors&) { auto b = bytes(in); return gloo->send(b, to, tag); });
  }
  Works recv(Tensors& t, int from, int tag) override {
    return run(c10d::OpType::RECV, true, {}, t, [=, this](Tensors&, Tensors& out) { auto b = bytes(out); return gloo->recv(b, from, tag); });
  }
  Works barrier(const c10d::BarrierOptions& o) override {
    auto device = o.device ? o.device->index() : !o.device_ids.empty() ? o.device_ids[0] : bound_device_id_ ? bound_device_id_->index() : current_device;
    auto one = at::zeros({1}, at::TensorOptions().device(c10::Device(TYPE, static_cast<c10::DeviceIndex>(device))));
    auto work = run(c10d::OpType::BARRIER, o.asyncOp, {one}, {}, [=, this](Tensors&, Tensors&) { return gloo->barrier(o); });
    static_cast<TwinWork*>(work.get())->is_barrier = true;
    return work;
  }
};
c10::intrusive_ptr<c10d::Backend> make_twinccl(const c10::intrusive_ptr<c10d::Backend>& gloo, int rank, int size) {
  return c10::make_intrusive<TwinCCL>(gloo, rank, size);
}

// ------------------------------------------------------------------------------------------------------------------------------ Python
void start(int devices, bool float64) {
  n_devices = devices;
  has_float64 = float64;
  streams.resize(size_t(devices) * PER_DEVICE);
  for (auto& s : streams) s.known.resize(streams.size(), 0);
  host_known.resize(streams.size(), 0);
  static Hooks hooks;
  at::RegisterPrivateUse1HooksInterface(&hooks);
  c10::SetAllocator(TYPE, &allocator);
  // A child of fork has one thread, so nobody else may hold the lock in it.
  pthread_atfork([] { mutex.lock(); }, [] { mutex.unlock(); }, [] { new (&mutex) std::mutex; new (&arrived) std::condition_variable; });
}
}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("start", &start);
  m.def("on_wait", [](py::object f) {
    if (!on_wait) on_wait = new py::object(py::none());
    py::object old = *on_wait;
    *on_wait = f;
    watched = !f.is_none();
    return old;
  });
  m.def("device_count", [] { return n_devices; });
  m.def("current_device", [] { return current_device; });
  m.def("default_generator", [](int i) { return default_generator(i); });
  m.def("limit", [](size_t bytes, int device) { std::lock_guard<std::mutex> lock(mutex); memory[device].limit = bytes; });
  m.def("float64", [](bool has) { auto had = has_float64; has_float64 = has; return had; });
  m.def("check_races", [](bool on) { auto was = checks_races; checks_races = on; return was; });
  m.def("races", [] { std::lock_guard<std::mutex> lock(mutex); auto all = races; races.clear(); return all; });
  m.def("n_pending", [] { std::lock_guard<std::mutex> lock(mutex); return tasks.size() + landings.size(); });
  m.def("make_twinccl", &make_twinccl);
}
