// Operators: each is the CPU's, run on the same memory. Part of twin.cpp.
#pragma once

namespace {
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
  "_ctc_loss", "_nested_tensor_from_mask", "segment_reduce", "_assert_scalar", "nms", "linalg_eig", "_linalg_eigvals", "geqrf", "linalg_lstsq"};

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
  if (call.name.find("masked_fill") == 0 && (*stack)[begin + 2].isTensor() && call.twins.size() == 3) waits = true;  // CUDA reads the value
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

// Cells of LSTM and GRU, which torch asks of every device but the CPU. Their sums have another order than the CPU's layers.
using MaybeTensor = std::optional<Tensor>;
std::tuple<Tensor, Tensor, Tensor> lstm_cell(const Tensor& ig, const Tensor& hg, const Tensor& cx, const MaybeTensor& bi, const MaybeTensor& bh) {
  auto gates = (bi && bi->defined() ? (ig + *bi) + (hg + *bh) : ig + hg).chunk(4, 1);
  auto i = gates[0].sigmoid(), f = gates[1].sigmoid(), g = gates[2].tanh(), o = gates[3].sigmoid();
  auto cy = f * cx + i * g;
  return {o * cy.tanh(), cy, at::cat({i, f, g, o}, 1)};
}
std::tuple<Tensor, Tensor, Tensor> lstm_cell_backward(const MaybeTensor& ghy, const MaybeTensor& gcy, const Tensor& cx, const Tensor& cy,
                                                      const Tensor& workspace, bool has_bias) {
  if (!(ghy && ghy->defined()) && !(gcy && gcy->defined())) return {};
  auto gates = workspace.chunk(4, 1);
  auto i = gates[0], f = gates[1], g = gates[2], o = gates[3], t = cy.tanh();
  auto gh = ghy && ghy->defined() ? *ghy : at::zeros_like(cx), gc = gh * o * (1 - t * t);
  if (gcy && gcy->defined()) gc = gc + *gcy;
  auto all = at::cat({gc * g * i * (1 - i), gc * cx * f * (1 - f), gc * i * (1 - g * g), gh * t * o * (1 - o)}, 1);
  return {all, gc * f, has_bias ? all.sum(0) : Tensor()};
}
std::tuple<Tensor, Tensor> gru_cell(const Tensor& ig, const Tensor& hg, const Tensor& hx, const MaybeTensor& bi, const MaybeTensor& bh) {
  auto a = (bi && bi->defined() ? ig + *bi : ig).chunk(3, 1), b = (bh && bh->defined() ? hg + *bh : hg).chunk(3, 1);
  auto r = (a[0] + b[0]).sigmoid(), z = (a[1] + b[1]).sigmoid(), n = (a[2] + r * b[2]).tanh();
  return {n + z * (hx - n), at::cat({r, z, n, hx, b[2]}, 1)};
}
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gru_cell_backward(const Tensor& g, const Tensor& workspace, bool has_bias) {
  auto parts = workspace.chunk(5, 1);
  auto r = parts[0], z = parts[1], n = parts[2], hx = parts[3], hn = parts[4];
  auto gn = g * (1 - z) * (1 - n * n), gr = gn * hn * r * (1 - r), gz = g * (hx - n) * z * (1 - z);
  auto gi = at::cat({gr, gz, gn}, 1), gh = at::cat({gr, gz, gn * r}, 1);
  return {gi, gh, g * z, has_bias ? gi.sum(0) : Tensor(), has_bias ? gh.sum(0) : Tensor()};
}

// The parts of SyncBatchNorm, which the CPU has not. Statistics are float32 at least, over all dimensions but the second.
bool given(const MaybeTensor& t) { return t && t->defined(); }
Tensor wide(const Tensor& t) { return t.scalar_type() == at::kDouble ? t : t.to(at::kFloat); }
std::vector<int64_t> others(const Tensor& t) {
  std::vector<int64_t> dims;
  for (int64_t d = 0; d < t.dim(); d++) if (d != 1) dims.push_back(d);
  return dims;
}
Tensor by_channel(const Tensor& v, const Tensor& like) {
  std::vector<int64_t> size(like.dim(), 1);
  size[1] = -1;
  return wide(v).view(size);
}
std::tuple<Tensor, Tensor> batch_norm_stats(const Tensor& x, double eps) {
  auto [var, mean] = at::var_mean(wide(x), others(x), 0);
  return {mean, (var + eps).rsqrt()};
}
std::tuple<Tensor, Tensor> batch_norm_gather(const Tensor&, const Tensor& means, const Tensor& invstds, const MaybeTensor& running_mean,
                                             const MaybeTensor& running_var, double momentum, double eps, const Tensor& counts) {
  auto n = wide(counts).view({-1, 1}), total = n.sum(), mean = (wide(means) * n).sum(0) / total;
  auto var = ((wide(invstds).pow(-2) - eps + (wide(means) - mean).square()) * n).sum(0) / total;
  if (given(running_mean)) running_mean->copy_(*running_mean * (1 - momentum) + mean * momentum);
  if (given(running_var)) running_var->copy_(*running_var * (1 - momentum) + var * (total / (total - 1)) * momentum);
  return {mean, (var + eps).rsqrt()};
}
Tensor batch_norm_elemt(const Tensor& x, const MaybeTensor& w, const MaybeTensor& b, const Tensor& mean, const Tensor& invstd, double) {
  auto y = (wide(x) - by_channel(mean, x)) * by_channel(invstd, x);
  if (given(w)) y = y * by_channel(*w, x);
  if (given(b)) y = y + by_channel(*b, x);
  return y.to(x.scalar_type());
}
std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_backward_reduce(const Tensor& g, const Tensor& x, const Tensor& mean, const Tensor& invstd,
                                                                     const MaybeTensor& w, bool, bool, bool) {
  auto sum = wide(g).sum(others(g)), with_x = (wide(g) * (wide(x) - by_channel(mean, x))).sum(others(g));
  auto kind = given(w) ? w->scalar_type() : sum.scalar_type();
  return {sum, with_x, (with_x * invstd).to(kind), sum.to(kind)};
}
Tensor batch_norm_backward_elemt(const Tensor& g, const Tensor& x, const Tensor& mean, const Tensor& invstd, const MaybeTensor& w, const Tensor& sum,
                                 const Tensor& with_x, const Tensor& counts) {
  auto n = wide(counts).sum(), scale = given(w) ? invstd * wide(*w) : invstd;
  auto centred = wide(g) - by_channel(sum / n, x) - (wide(x) - by_channel(mean, x)) * by_channel(with_x / n * invstd * invstd, x);
  return (centred * by_channel(scale, x)).to(g.scalar_type());
}

// Attention, where the CPU would take its fused kernel.
constexpr auto FUSED = "aten::_scaled_dot_product_flash_attention_for_cpu", FUSED_BACKWARD = "aten::_scaled_dot_product_flash_attention_for_cpu_backward";
void attention(const c10::OperatorHandle&, DispatchKeySet, torch::jit::Stack* stack) {
  static auto op = c10::Dispatcher::singleton().findSchemaOrThrow(FUSED, "");
  auto given = torch::jit::pop(*stack, 8);  // query, key, value, mask, dropout, causal, debug mask, scale
  auto q = given[0].toTensor(), k = given[1].toTensor();
  for (auto i : {0, 1, 2, 4, 5, 3, 7}) stack->push_back(given[i]);
  run_on_host(op, stack);
  auto none = at::empty({0}, q.options().dtype(at::kLong));
  for (const c10::IValue& v : {c10::IValue(none), c10::IValue(none), c10::IValue(q.size(2)), c10::IValue(k.size(2)), c10::IValue(none), c10::IValue(none),
                               c10::IValue(at::empty({0}, q.options()))}) stack->push_back(v);
}
void attention_backward(const c10::OperatorHandle&, DispatchKeySet, torch::jit::Stack* stack) {
  static auto op = c10::Dispatcher::singleton().findSchemaOrThrow(FUSED_BACKWARD, "");
  auto given = torch::jit::pop(*stack, 17);  // grad, query, key, value, mask, grad_input_mask, out, logsumexp, 4 sizes, dropout, causal, seed, offset, scale
  if (given[4].isTensor() && !given[4].toTensor().defined()) given[4] = c10::IValue();
  for (auto i : {0, 1, 2, 3, 6, 7, 12, 13, 4, 16}) stack->push_back(given[i]);
  run_on_host(op, stack);
  stack->push_back(Tensor());           // no gradient of the mask: with one that needs it, the choice is the plain computation
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

// Module.to() keeps a Parameter where its data may take the place of the old: for CUDA torch says so, for an unknown device it would not.
bool may_replace(const Tensor& self, const Tensor& from) {
  return (self.layout() == c10::kStrided && from.layout() == c10::kStrided) ||
         self.unsafeGetTensorImpl()->has_compatible_shallow_copy_type(from.key_set());
}
TORCH_LIBRARY_IMPL(aten, AutogradPrivateUse1, m) { m.impl("_has_compatible_shallow_copy_type", TORCH_FN(may_replace)); }

// torch prefers its general kernels to a backend's fallback: whatever has a kernel for the CPU is registered one by one, so that it is taken.
void take_kernels(torch::Library& m, DispatchKey key, DispatchKey cpu) {
  auto& dispatcher = c10::Dispatcher::singleton();
  for (auto& name : dispatcher.getAllOpNames()) {
    auto op = dispatcher.findOp(name);
    if (name.name.rfind("aten::", 0) == 0 && name.name != "aten::copy_" && op->hasKernelForDispatchKey(cpu) && !op->hasKernelForDispatchKey(key))
      m.impl(c10::toString(name).c_str(), torch::CppFunction::makeFromBoxedFunction<&fallback>());
  }
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }
TORCH_LIBRARY_IMPL(_, SparsePrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }
TORCH_LIBRARY_IMPL(aten, SparsePrivateUse1, m) {
  m.impl("_copy_from", TORCH_FN(copy_sparse));
  take_kernels(m, DispatchKey::SparsePrivateUse1, DispatchKey::SparseCPU);
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
  m.impl("_has_compatible_shallow_copy_type", TORCH_FN(may_replace));
  m.impl("_thnn_fused_lstm_cell", TORCH_FN(lstm_cell));
  m.impl("_thnn_fused_lstm_cell_backward_impl", TORCH_FN(lstm_cell_backward));
  m.impl("_thnn_fused_gru_cell", TORCH_FN(gru_cell));
  m.impl("_thnn_fused_gru_cell_backward", TORCH_FN(gru_cell_backward));
  m.impl("batch_norm_stats", TORCH_FN(batch_norm_stats));
  m.impl("batch_norm_gather_stats_with_counts", TORCH_FN(batch_norm_gather));
  m.impl("batch_norm_elemt", TORCH_FN(batch_norm_elemt));
  m.impl("batch_norm_backward_reduce", TORCH_FN(batch_norm_backward_reduce));
  m.impl("batch_norm_backward_elemt", TORCH_FN(batch_norm_backward_elemt));
  m.impl("convolution_overrideable", torch::CppFunction::makeFromBoxedFunction<&convolution>());
  m.impl("convolution_backward_overrideable", torch::CppFunction::makeFromBoxedFunction<&convolution_backward>());
  m.impl("_scaled_dot_product_fused_attention_overrideable", torch::CppFunction::makeFromBoxedFunction<&attention>());
  m.impl("_scaled_dot_product_fused_attention_overrideable_backward", torch::CppFunction::makeFromBoxedFunction<&attention_backward>());
  take_kernels(m, DispatchKey::PrivateUse1, DispatchKey::CPU);
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
int64_t twin_sdp_choice(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& mask, double dropout, bool causal,
                        std::optional<double> scale, bool gqa) {
  auto of_cpu = at::_fused_sdp_choice(on_host(q), on_host(k), on_host(v), mask ? std::optional<Tensor>(on_host(*mask)) : mask, dropout, causal, scale, gqa);
  bool fused = of_cpu != int64_t(SDPBackend::math) && !(mask && mask->requires_grad());
  return int64_t(fused ? SDPBackend::overrideable : SDPBackend::math);
}
REGISTER_PRIVATEUSE1_DISPATCH(_fused_sdp_choice_stub, &twin_sdp_choice)
}  // namespace at::native
