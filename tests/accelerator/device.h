// Memory, the detector of races, and what torch asks of a device: allocators, guard, generators, hooks. Part of twin.cpp.
#pragma once

namespace {
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
struct Freed {                          // memory that another stream may still use: to be given out again after that only
  c10::Storage host;
  int stream;
  std::vector<Mark> uses;
  std::string what;
};
auto& freed = *new std::list<Freed>;
struct Memory { size_t allocated = 0, peak = 0, limit = size_t(1) << 33; int64_t n_blocks = 0, n_ooms = 0; };
Memory memory[64];

void free_block(void* context) {
  std::unique_ptr<Block> block(static_cast<Block*>(context));
  std::lock_guard<std::mutex> lock(mutex);
  memory[block->device].allocated -= block->size;
  memory[block->device].n_blocks--;
  Freed left{block->host, block->stream, {}, ""};
  for (auto& [stream, at] : block->uses) {
    if (stream == block->stream || block->recorded.count(stream) || over(streams[block->stream].known, {stream, at})) continue;
    left.uses.push_back({stream, at});
    left.what = c10::str("memory of ", name_of(block->stream), ", last written by ", block->writer, ", was freed and given out again while ",
                         name_of(stream), " perhaps uses it: call record_stream, or let its own stream wait");
  }
  if (!left.uses.empty()) freed.push_back(std::move(left));
}
// A caching allocator gives a stream its own memory again at once, in the order of the stream: other streams' uses must be over by then.
void look_at_freed(int stream) {
  std::list<Freed> now;                 // dropped without the lock
  std::lock_guard<std::mutex> lock(mutex);
  for (auto it = freed.begin(); it != freed.end();) {
    auto next = std::next(it);
    if (it->stream == stream) {
      for (auto& use : it->uses) if (!over(streams[stream].known, use)) {
        races.push_back(it->what);
        std::memset(it->host.mutable_data(), 0xFF, it->host.nbytes());
        break;
      }
      now.splice(now.end(), freed, it);
    }
    it = next;
  }
}

c10::DataPtr make_block(c10::Storage host, int device) {
  auto n = host.nbytes();
  c10::Device where(TYPE, static_cast<c10::DeviceIndex>(device));
  if (!n) return {nullptr, where};
  use_device();
  look_at_freed(current_stream(device));
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
  use_device();
  Mark mark;
  std::string race;
  Clock known;
  {
    std::lock_guard<std::mutex> lock(mutex);
    auto& state = streams[stream];
    auto check = [&](const Use& use, const char* did, const std::string& who, Mark other) {
      if (race.empty() && other.stream >= 0 && other.stream != stream && !over(state.known, other))
        race = c10::str("race: ", op, " on ", name_of(stream), use.writes ? " writes" : " reads", " memory that ", who.empty() ? "an operation" : who, did, " on ", name_of(other.stream),
                        ", and has not waited for it (wait_stream, wait_event or work.wait() is missing)");
    };
    if (checks_races) for (auto& use : uses) if (use.block) {
      check(use, " wrote", use.block->writer, use.block->written);
      if (use.writes) for (auto& [other, at] : use.block->reads) check(use, " reads", "", {other, at});
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
    TORCH_CHECK(d.index() < n_devices, "twin: there is no device ", int(d.index()), ", only ", n_devices, ": invalid device ordinal");
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
}  // namespace
