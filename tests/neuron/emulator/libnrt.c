/* An emulator of AWS's libnrt, for tests on machines without a Neuron device.
 *
 * It keeps tensors in host memory and hands every load and execute to Python, which runs the HLO
 * on XLA's CPU client. It proves that Octavo calls the interface as its public headers declare it:
 * layouts, names, sizes, order, aliasing, errors. It proves nothing about a device: no number of
 * the real compiler, no speed, no memory layout, no collective over links, no fault of hardware.
 * Where the real library's behaviour is not documented this one is strict.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { OK = 0, INVALID = 2, RESOURCE = 4, UNINITIALIZED = 13, BAD_INPUT = 1002 };
enum { CORES = 64, MOST = 65536 };

typedef struct {
    size_t size;
    int core;
    unsigned char *data;
} tensor_t;

typedef struct {
    size_t count;
    struct { char name[256]; tensor_t *tensor; } *entries;
} set_t;

typedef struct {
    char name[256];
    int usage;
    size_t size;
    int dtype;
    uint32_t *shape;
    uint32_t ndim;
} info_t;

typedef struct {
    uint64_t count;
    info_t entries[];
} infos_t;

typedef struct {
    int core;
    infos_t *infos;
} model_t;

typedef struct { uint32_t family, size; char arch[16]; char revision[8]; } instance_t;
typedef struct { size_t used, limit; } memory_t;
typedef struct { uint64_t numbers[4]; char detail[128]; char hash[64]; } version_t;

typedef int (*load_t)(model_t *model, const void *neff, size_t size, uint32_t rank, uint32_t ranks);
typedef int (*run_t)(model_t *model, size_t inputs, void **in, size_t outputs, void **out);

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static load_t on_load;
static run_t on_run;
static int ready, next_failure;
static uint32_t cores = 2, family = 4;
static size_t limit = (size_t)16 << 30, used[CORES], tensors, sets, models;

/* --- for the tests --- */

void emulator_attach(load_t load, run_t run) { on_load = load; on_run = run; }
void emulator_become(uint32_t count, uint32_t kind, size_t bytes) {
    cores = count; family = kind; limit = bytes;
}
void emulator_fail(int code) { next_failure = code; } /* of the next execute */
void emulator_counts(size_t *out) { out[0] = tensors; out[1] = sets; out[2] = models; }

int emulator_describe(model_t *model, const char *name, int usage, size_t size, int dtype,
                      const uint32_t *shape, uint32_t ndim) {
    uint64_t at = model->infos->count;
    infos_t *grown = realloc(model->infos, sizeof(infos_t) + (at + 1) * sizeof(info_t));
    if (!grown || at >= MOST) return RESOURCE;
    info_t *info = &grown->entries[at];
    memset(info, 0, sizeof *info);
    snprintf(info->name, sizeof info->name, "%s", name);
    info->usage = usage; info->size = size; info->dtype = dtype; info->ndim = ndim;
    info->shape = malloc((ndim ? ndim : 1) * sizeof(uint32_t));
    memcpy(info->shape, shape, ndim * sizeof(uint32_t));
    grown->count = at + 1;
    model->infos = grown;
    return OK;
}

/* A process that nobody prepared, such as a server's child, attaches itself. */
static void attach(void) {
    int (*ensure)(void) = (int (*)(void))dlsym(RTLD_DEFAULT, "PyGILState_Ensure");
    void (*release)(int) = (void (*)(int))dlsym(RTLD_DEFAULT, "PyGILState_Release");
    int (*run)(const char *) = (int (*)(const char *))dlsym(RTLD_DEFAULT, "PyRun_SimpleString");
    Dl_info me;
    if (!ensure || !release || !run || !dladdr((void *)attach, &me)) return;
    char program[4352];
    snprintf(program, sizeof program,
             "from tests.neuron.emulator.host import attach\nattach(%c%s%c)\n",
             '"', me.dli_fname, '"');
    int state = ensure();
    run(program);
    release(state);
}

/* --- the interface --- */

int nrt_init(int framework, const char *version, const char *fal) {
    (void)version; (void)fal;
    if (framework != 1) return INVALID;
    if (!on_load) attach();
    ready = on_load != NULL;
    return ready ? OK : 1;
}

void nrt_close(void) { ready = 0; }

int nrt_get_visible_vnc_count(uint32_t *count) { *count = cores; return OK; }

int nrt_get_instance_info(instance_t *info, size_t size) {
    if (size != sizeof *info) return INVALID;
    memset(info, 0, sizeof *info);
    info->family = family;
    strcpy(info->arch, "emulator");
    return OK;
}

int nrt_get_version(version_t *version, size_t size) {
    if (size != sizeof *version) return INVALID;
    memset(version, 0, sizeof *version);
    version->numbers[0] = 2;
    strcpy(version->detail, "emulator");
    return OK;
}

int nrt_get_vnc_memory_stats(uint32_t core, memory_t *stats, size_t size, size_t *written) {
    if (core >= cores || size != sizeof *stats) return INVALID;
    stats->used = used[core]; stats->limit = limit; *written = sizeof *stats;
    return OK;
}

static int load(const void *neff, size_t size, int32_t core, uint32_t rank, uint32_t ranks,
                model_t **out) {
    if (!ready) return UNINITIALIZED;
    if (core < 0 || (uint32_t)core >= cores) return 9;
    model_t *model = calloc(1, sizeof *model);
    model->core = core;
    model->infos = calloc(1, sizeof(infos_t));
    int status = on_load(model, neff, size, rank, ranks);
    if (status) return status;
    pthread_mutex_lock(&lock); models++; pthread_mutex_unlock(&lock);
    *out = model;
    return OK;
}

int nrt_load(const void *neff, size_t size, int32_t core, int32_t count, model_t **out) {
    return count == -1 ? load(neff, size, core, 0, 1, out) : INVALID;
}

int nrt_load_collectives(const void *neff, size_t size, int32_t core, int32_t count, uint32_t rank,
                         uint32_t ranks, model_t **out) {
    return count == -1 && rank < ranks ? load(neff, size, core, rank, ranks, out) : INVALID;
}

int nrt_unload(model_t *model) {
    pthread_mutex_lock(&lock); models--; pthread_mutex_unlock(&lock);
    model->core = -1; /* kept, so that a use of it afterwards is seen */
    return OK;
}

int nrt_get_model_tensor_info(model_t *model, infos_t **out) {
    size_t size = sizeof(infos_t) + model->infos->count * sizeof(info_t);
    *out = malloc(size);
    memcpy(*out, model->infos, size);
    return OK;
}

int nrt_free_model_tensor_info(infos_t *infos) { free(infos); return OK; }

int nrt_tensor_allocate(int placement, int core, size_t size, const char *name, tensor_t **out) {
    (void)name;
    if (!ready) return UNINITIALIZED;
    if (placement != 0 || core < 0 || (uint32_t)core >= cores || !size) return INVALID;
    tensor_t *tensor = malloc(sizeof *tensor);
    pthread_mutex_lock(&lock);
    int full = used[core] + size > limit;
    if (!full) { used[core] += size; tensors++; }
    pthread_mutex_unlock(&lock);
    if (full) { free(tensor); return RESOURCE; }
    tensor->size = size; tensor->core = core;
    tensor->data = aligned_alloc(64, (size + 63) / 64 * 64);
    memset(tensor->data, 0xAB, size); /* what nobody wrote is no zero */
    *out = tensor;
    return OK;
}

void nrt_tensor_free(tensor_t **tensor) {
    pthread_mutex_lock(&lock);
    used[(*tensor)->core] -= (*tensor)->size; tensors--;
    pthread_mutex_unlock(&lock);
    free((*tensor)->data); free(*tensor);
    *tensor = NULL;
}

size_t nrt_tensor_get_size(const tensor_t *tensor) { return tensor->size; }

static int outside(const tensor_t *t, size_t offset, size_t size) {
    return offset > t->size || size > t->size - offset;
}

int nrt_tensor_write(tensor_t *tensor, const void *from, size_t offset, size_t size) {
    if (outside(tensor, offset, size)) return INVALID;
    memcpy(tensor->data + offset, from, size);
    return OK;
}

int nrt_tensor_read(const tensor_t *tensor, void *to, size_t offset, size_t size) {
    if (outside(tensor, offset, size)) return INVALID;
    memcpy(to, tensor->data + offset, size);
    return OK;
}

int nrt_tensor_memset(tensor_t *tensor, uint64_t offset, int value, size_t size) {
    if (outside(tensor, offset, size)) return INVALID;
    memset(tensor->data + offset, value, size);
    return OK;
}

int nrt_allocate_tensor_set(set_t **out) {
    *out = calloc(1, sizeof **out);
    pthread_mutex_lock(&lock); sets++; pthread_mutex_unlock(&lock);
    return OK;
}

void nrt_destroy_tensor_set(set_t **set) {
    free((*set)->entries); free(*set);
    *set = NULL;
    pthread_mutex_lock(&lock); sets--; pthread_mutex_unlock(&lock);
}

int nrt_add_tensor_to_tensor_set(set_t *set, const char *name, tensor_t *tensor) {
    if (strlen(name) > 255) return INVALID;
    set->entries = realloc(set->entries, (set->count + 1) * sizeof *set->entries);
    strcpy(set->entries[set->count].name, name);
    set->entries[set->count++].tensor = tensor;
    return OK;
}

static int gather(const model_t *model, const set_t *set, int usage, void **out, size_t *count) {
    *count = 0;
    for (uint64_t i = 0; i < model->infos->count; i++) {
        const info_t *info = &model->infos->entries[i];
        if (info->usage != usage) continue;
        const tensor_t *found = NULL;
        for (size_t j = 0; j < set->count; j++)
            if (!strcmp(set->entries[j].name, info->name)) found = set->entries[j].tensor;
        if (!found || found->size != info->size || found->core != model->core) return BAD_INPUT;
        out[(*count)++] = found->data;
    }
    return *count == set->count ? OK : BAD_INPUT;
}

int nrt_execute(model_t *model, const set_t *in, set_t *out) {
    if (!ready) return UNINITIALIZED;
    if (model->core < 0) return INVALID;
    int failure = __atomic_exchange_n(&next_failure, 0, __ATOMIC_SEQ_CST);
    if (failure) return failure;
    size_t inputs, outputs, most = model->infos->count + 1;
    void **pointers = malloc(2 * most * sizeof(void *));
    int status = gather(model, in, 0, pointers, &inputs);
    if (!status) status = gather(model, out, 1, pointers + most, &outputs);
    if (!status) status = on_run(model, inputs, pointers, outputs, pointers + most);
    free(pointers);
    return status;
}
