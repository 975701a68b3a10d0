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
#include <torch/csrc/distributed/c10d/reducer_timer.hpp>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <condition_variable>
#include <list>
#include <map>
#include <mutex>
#include <set>
#include <thread>
#include <unordered_set>

#include "streams.h"
#include "device.h"
#include "operators.h"
#include "twinccl.h"

namespace {
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
  pthread_atfork([] { mutex.lock(); }, [] { mutex.unlock(); }, [] {
    new (&mutex) std::mutex;
    new (&arrived) std::condition_variable;
    bad_fork = used.load();
  });
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
  m.def("is_used", [] { return used.load(); });
  m.def("is_in_bad_fork", [] { return bad_fork.load(); });
  m.def("n_pending", [] { std::lock_guard<std::mutex> lock(mutex); return tasks.size() + landings.size(); });
  m.def("make_twinccl", &make_twinccl);
}
