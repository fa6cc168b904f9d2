// A second device for machines that have none: the CPU's memory and kernels, behind a device type of its own.
//
// A kernel runs the CPU's on aliases of the same memory, so that numbers are the CPU's. As on a GPU, a tensor of the CPU
// beside tensors of the device is refused (0-dimensional ones are not), and what makes the host wait is counted: copies
// to the host, single numbers, and operations whose result, or its shape, is known only once they have run.

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/InferSize.h>
#include <ATen/TensorUtils.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace {

using at::Tensor;
using Sizes = c10::SymIntArrayRef;

constexpr auto kSecond = c10::DeviceType::PrivateUse1;
std::atomic<int64_t> reads{0};

// ------------------------------------------------------------------------------------------- what a device consists of

struct Memory final : at::Allocator {
  at::DataPtr allocate(size_t bytes) override {
    void* data = bytes ? std::malloc(bytes) : nullptr;
    return {data, data, &std::free, c10::Device(kSecond, 0)};
  }
  at::DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void* target, const void* source, std::size_t bytes) const override {
    std::memcpy(target, source, bytes);
  }
};
Memory memory;
REGISTER_ALLOCATOR(kSecond, &memory);

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kSecond; }
  c10::Device exchangeDevice(c10::Device device) const override { return device; }
  c10::Device getDevice() const override { return {kSecond, 0}; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    static const at::Generator generator = at::detail::getDefaultCPUGenerator();
    return generator;
  }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::detail::createCPUGenerator(); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    at::native::resize_bytes_cpu(storage.unsafeGetStorageImpl(), bytes);
  }
};
Hooks hooks;

// -------------------------------------------------------------------------------------------------- tensors and copies

bool on_second(const Tensor& tensor) { return tensor.defined() && tensor.device().type() == kSecond; }

Tensor on_host(const Tensor& tensor) {  // the same memory as a tensor of the CPU
  if (!on_second(tensor)) return tensor;
  auto options = at::TensorOptions().dtype(tensor.scalar_type()).device(at::kCPU);
  auto count = static_cast<int64_t>(tensor.storage().nbytes() / tensor.element_size());
  auto whole = at::from_blob(const_cast<void*>(tensor.storage().data()), {count}, options);
  auto part = whole.as_strided(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  part._set_conj(tensor.is_conj());
  part._set_neg(tensor.is_neg());
  return part;
}

Tensor empty(at::IntArrayRef sizes, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_generic(sizes, &memory, keys, c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(at::IntArrayRef sizes, at::IntArrayRef strides, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_strided_generic(sizes, strides, &memory, keys, c10::dtype_or_default(dtype));
}

Tensor moved(const Tensor& host) {  // a new tensor of the device with the numbers of one of the CPU
  if (!host.defined() || !host.is_cpu()) return host;
  auto made = empty_strided(host.sizes(), host.strides(), host.scalar_type(), {}, {}, {});
  on_host(made).copy_(host);
  return made;
}

Tensor as_strided(const Tensor& self, Sizes sizes, Sizes strides, std::optional<c10::SymInt> offset) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(self.storage()),
                                                       self.key_set(), self.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(C10_AS_INTARRAYREF_SLOW(sizes), C10_AS_INTARRAYREF_SLOW(strides),
                                                    offset ? offset->expect_int() : self.storage_offset());
  return made;
}

Tensor view(const Tensor& self, Sizes wanted) {
  auto sizes = at::infer_size_dv(C10_AS_INTARRAYREF_SLOW(wanted), self.numel());
  auto strides = at::detail::computeStride(self.sizes(), self.strides(), sizes);
  TORCH_CHECK(strides.has_value(), "expected a shape that is a view, got ", wanted, ": use reshape");
  return as_strided(self, c10::fromIntArrayRefSlow(sizes), c10::fromIntArrayRefSlow(*strides), std::nullopt);
}

Tensor reshape_alias(const Tensor& self, Sizes sizes, Sizes strides) {
  return as_strided(self, sizes, strides, std::nullopt);
}

Tensor& set_storage(Tensor& self, at::Storage storage, c10::SymInt offset, Sizes sizes, Sizes strides) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(storage));
  impl->set_sizes_and_strides(C10_AS_INTARRAYREF_SLOW(sizes), C10_AS_INTARRAYREF_SLOW(strides), offset.expect_int());
  return self;
}

Tensor& set_whole_storage(Tensor& self, at::Storage storage) {
  auto count = static_cast<int64_t>(storage.nbytes() / self.element_size());
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(storage));
  impl->set_sizes_and_strides(at::IntArrayRef{count}, at::IntArrayRef{1}, 0);
  return self;
}

const Tensor& resize(const Tensor& self, Sizes wanted, std::optional<at::MemoryFormat>) {
  auto sizes = C10_AS_INTARRAYREF_SLOW(wanted);
  auto bytes = static_cast<size_t>((c10::multiply_integers(sizes) + self.storage_offset()) * self.element_size());
  auto* storage = self.storage().unsafeGetStorageImpl();
  if (storage->nbytes() < bytes) at::native::resize_bytes_cpu(storage, bytes);
  self.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  return self;
}

Tensor copy_from(const Tensor& source, const Tensor& target, bool) {
  if (target.is_cpu()) ++reads;
  on_host(target).copy_(on_host(source));
  return target;
}

Tensor copy_from_and_resize(const Tensor& source, const Tensor& target) {
  return copy_from(source, target.is_cpu() ? target.resize_as_(source) : resize(target, source.sym_sizes(), {}), false);
}

at::Scalar number(const Tensor& self) {
  ++reads;
  return on_host(self).item();
}

// --------------------------------------------------------------------------------------------------- every other kernel

bool waits(const c10::OperatorHandle& op, const std::vector<c10::IValue>& arguments) {
  if (op.hasTag(at::Tag::data_dependent_output)) return true;
  if (!op.hasTag(at::Tag::dynamic_output_shape)) return false;
  for (const auto& argument : arguments) {  // indexing waits for masks alone
    if (!argument.isOptionalTensorList()) continue;
    for (std::optional<Tensor> index : argument.toOptionalTensorList()) {
      if (index && on_second(*index) && index->scalar_type() == at::kBool) return true;
    }
    return false;
  }
  return true;
}

void kernel(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto count = schema.arguments().size();
  const auto given = torch::jit::last(*stack, count).vec();
  auto alike = [&](const Tensor& tensor) {
    TORCH_CHECK(!tensor.defined() || on_second(tensor) || tensor.dim() == 0,
                "expected all tensors on one device, got one of shape ", tensor.sizes(), " on ", tensor.device(),
                " beside others on the second device in ", schema.operator_name(), ": move it there");
    return on_host(tensor);
  };
  if (waits(op, given)) ++reads;
  for (size_t i = 0; i < count; ++i) {  // an output that is still to be given its size
    const auto* info = schema.arguments()[i].alias_info();
    if (!info || !info->isWrite() || !given[i].isTensor()) continue;
    if (on_second(given[i].toTensor()) && given[i].toTensor().storage().nbytes() == 0) {
      const auto before = reads.load();  // its copies are not the program's
      at::native::cpu_fallback(op, stack);
      reads = before;
      return;
    }
  }
  torch::jit::Stack host;
  for (const auto& argument : given) {
    if (argument.isTensor()) {
      host.emplace_back(alike(argument.toTensor()));
    } else if (argument.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& tensor : argument.toTensorVector()) list.push_back(alike(tensor));
      host.emplace_back(std::move(list));
    } else if (argument.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (std::optional<Tensor> index : argument.toOptionalTensorList()) {  // of either device, as everywhere
        list.push_back(index ? std::optional<Tensor>(on_host(*index)) : std::nullopt);
      }
      host.emplace_back(std::move(list));
    } else if (argument.isDevice()) {
      host.emplace_back(c10::Device(at::kCPU));
    } else {
      host.push_back(argument);
    }
  }
  torch::jit::drop(*stack, count);
  op.callBoxed(&host);
  for (size_t k = 0; k < host.size(); ++k) {
    const auto* info = k < schema.returns().size() ? schema.returns()[k].alias_info() : nullptr;
    const c10::IValue* same = nullptr;  // the argument that is returned
    for (size_t i = 0; info && i < count && !same; ++i) {
      const auto* own = schema.arguments()[i].alias_info();
      if (own && *own == *info) same = &given[i];
    }
    if (same) {
      stack->push_back(*same);
    } else if (host[k].isTensor()) {
      stack->emplace_back(moved(host[k].toTensor()));
    } else if (host[k].isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& tensor : host[k].toTensorVector()) list.push_back(moved(tensor));
      stack->emplace_back(std::move(list));
    } else {
      stack->push_back(host[k]);
    }
  }
}

// ------------------------------------------------- convolutions, which torch leaves to such a device under other names

Tensor convolution(const Tensor& x, const Tensor& w, const std::optional<Tensor>& bias, Sizes stride, Sizes padding,
                   Sizes dilation, bool transposed, Sizes output_padding, c10::SymInt groups) {
  auto host_bias = bias && bias->defined() ? std::optional<Tensor>(on_host(*bias)) : std::nullopt;
  return moved(at::convolution_symint(on_host(x), on_host(w), host_bias, stride, padding, dilation, transposed,
                                      output_padding, groups));
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(const Tensor& grad, const Tensor& x, const Tensor& w,
                                                        Sizes stride, Sizes padding, Sizes dilation, bool transposed,
                                                        Sizes output_padding, c10::SymInt groups,
                                                        std::array<bool, 3> wanted) {
  auto bias_sizes = std::vector<c10::SymInt>{grad.sym_size(1)};
  auto [dx, dw, db] = at::convolution_backward_symint(on_host(grad), on_host(x), on_host(w), Sizes(bias_sizes), stride,
                                                      padding, dilation, transposed, output_padding, groups, wanted);
  return {moved(dx), moved(dw), moved(db)};
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&kernel>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
  library.impl("as_strided", as_strided);
  library.impl("view", view);
  library.impl("_reshape_alias", reshape_alias);
  library.impl("set_.source_Storage_storage_offset", set_storage);
  library.impl("set_.source_Storage", set_whole_storage);
  library.impl("resize_", resize);
  library.impl("_copy_from", copy_from);
  library.impl("_copy_from_and_resize", copy_from_and_resize);
  library.impl("_local_scalar_dense", number);
  library.impl("convolution_overrideable", convolution);
  library.impl("convolution_backward_overrideable", convolution_backward);
}

}  // namespace

extern "C" void second_device_register() { at::RegisterPrivateUse1HooksInterface(&hooks); }
extern "C" int64_t second_device_reads() { return reads; }
