// What orders work: streams, clocks, what is yet to be done, and where the host waits. Part of twin.cpp.
#pragma once

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

// A process that was forked after the device had been used cannot use it, as with CUDA.
std::atomic<bool> used{false}, bad_fork{false};
void use_device() {
  TORCH_CHECK(!bad_fork, "Cannot re-initialize twin in forked subprocess. To use twin with multiprocessing, you must use the 'spawn' start method");
  used = true;
}
}  // namespace
