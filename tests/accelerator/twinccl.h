// The collective backend: gloo's collectives on copies, with the streams and refusals of NCCL. Part of twin.cpp.
#pragma once

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

struct Timer final : c10d::Timer {      // DDP's logger warns where a device has none
  explicit Timer(c10::Device) {}
  std::optional<int64_t> measureDifference(Event start, Event end) override {
    auto a = getTimestamp(start), b = getTimestamp(end);
    return a && b ? std::optional<int64_t>(*b - *a) : std::nullopt;
  }
};
}  // namespace
namespace c10d {
C10_REGISTER_TYPED_CLASS(TimerRegistry, c10::kPrivateUse1, ::Timer)
}
