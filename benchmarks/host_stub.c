/* The calls of NVIDIA's driver that Triton makes to load and launch a kernel; each succeeds and does nothing,
   but that launches are counted. */
#include <stddef.h>
#include <stdint.h>

typedef int Result;
enum { HANDLE = 0x10 };

Result cuInit(unsigned flags) { return 0; }
Result cuDriverGetVersion(int *version) { *version = 13000; return 0; }
Result cuGetErrorString(Result error, const char **text) { *text = "stub"; return 0; }
Result cuCtxGetCurrent(void **context) { *context = (void *)HANDLE; return 0; }
Result cuCtxSetCurrent(void *context) { return 0; }
Result cuCtxGetLimit(size_t *value, int limit) { *value = 0; return 0; }
Result cuCtxSetLimit(int limit, size_t value) { return 0; }
Result cuDeviceGet(int *device, int ordinal) { *device = 0; return 0; }
Result cuCtxGetDevice(int *device) { *device = 0; return 0; }
Result cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)HANDLE; return 0; }
/* Of an H100: warp size, registers, multiprocessors, shared memory a multiprocessor and a block, with and without
   asking for more. */
Result cuDeviceGetAttribute(int *value, int attribute, int device) {
  switch (attribute) {
  case 10: *value = 32; break;
  case 12: *value = 65536; break;
  case 16: *value = 132; break;
  case 81: *value = 233472; break;
  case 8: *value = 49152; break;
  case 97: *value = 232448; break;
  default: *value = 1;
  }
  return 0;
}
Result cuModuleLoadData(void **module, const void *image) { *module = (void *)HANDLE; return 0; }
Result cuModuleGetFunction(void **function, void *module, const char *name) { *function = (void *)HANDLE; return 0; }
Result cuModuleUnload(void *module) { return 0; }
Result cuStreamIsCapturing(void *stream, int *status) { *status = 0; return 0; }
Result cuFuncGetAttribute(int *value, int attribute, void *function) { *value = attribute == 0 ? 1024 : 0; return 0; }
Result cuFuncSetAttribute(void *function, int attribute, int value) { return 0; }
Result cuFuncSetCacheConfig(void *function, int config) { return 0; }
static int launched;
int launches(void) { return launched; }
Result cuLaunchKernelEx(const void *config, void *function, void **parameters, void **extra) { launched++; return 0; }
Result cuOccupancyMaxActiveClusters(int *clusters, void *function, const void *config) { *clusters = 1; return 0; }
Result cuPointerGetAttribute(void *value, int attribute, uintptr_t pointer) { *(uintptr_t *)value = pointer; return 0; }
Result cuPointerGetAttributes(unsigned count, int *attributes, void **values, uintptr_t pointer) {
  for (unsigned i = 0; i < count; i++) *(uintptr_t *)values[i] = pointer;
  return 0;
}
Result cuTensorMapEncodeTiled(void) { return 0; }
Result cuTensorMapEncodeIm2col(void) { return 0; }
