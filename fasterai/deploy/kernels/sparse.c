// Sparse layers for inference on a CPU: convolution, matrix-vector product and max pooling of float32 tensors
// in NCHW.
//
// Nothing is allocated here and no library is linked: the caller gives all memory, and the functions that
// start threads. Every function that is exported checks sizes before it writes, and returns 0, or one of the
// numbers of `enum Refused`.
//
// The convolution packs a tile of the input into a panel that fits L1, then runs over the weights that are
// not zero. The panel has one copy of the tile for each column of the kernel, shifted by that column. So a
// weight is one offset into the panel, the same for all outputs of the tile, and the loads at that offset are
// aligned. A load from L1 that is aligned costs nothing beside a multiplication; from L2, or across a cache
// line, it costs as much again. For each output channel the tile of outputs stays in registers while its
// weights pass.
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifndef LANES
#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
#endif

// processors with 32 vector registers hold a larger tile
#if (defined(__AVX512F__) && LANES == 16) || defined(__aarch64__)
#define MANY_REGISTERS 1
#else
#define MANY_REGISTERS 0
#endif

#ifdef __clang__
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 32")
#endif
#define INLINE static inline __attribute__((always_inline))

// What is done with an output: negative ones become zero, and those above six become six. NaN stays NaN.
enum Activation { NONE, RELU, RELU6 };
INLINE float activated(float v, int64_t activation) {
    if (activation != NONE && v < 0) v = 0;
    if (activation == RELU6 && v > 6) v = 6;
    return v;
}
#define ACTIVATE(Type, v, activation) { \
    const Type six = 6 - (Type){0}; \
    if (activation != NONE) v = (Type)((Type##Mask)v & ~(Type##Mask)(v < (Type){0})); \
    if (activation == RELU6) { \
        Type##Mask above = (Type##Mask)(v > six); \
        v = (Type)(((Type##Mask)v & ~above) | ((Type##Mask)six & above)); \
    } \
}

// Vectors that may lie anywhere in memory, so `aligned(4)`; the compiler makes of them what the processor
// has.
#define VECTOR(name, lanes) \
    typedef float name __attribute__((vector_size(4 * (lanes)), aligned(4), may_alias)); \
    typedef int32_t name##Mask __attribute__((vector_size(4 * (lanes)), aligned(4), may_alias))
VECTOR(Vector, LANES);
VECTOR(Half, 8);
VECTOR(Quarter, 4);

enum Refused { FINE, BAD_SIZE, BAD_TILE, BAD_CHUNK, BAD_OFFSET, BAD_LENGTH, BAD_CUT, SMALL_SCRATCH };


// --- threads -------------------------------------------------------------------------------------
// Work is split into items of their own output. Each thread begins with a share of its own, the same one in
// every layer, for it finds in its caches what it has written in the layer before. Then it takes what is left
// of the others' shares: where the system lets one wait, the others go on.

// Functions of the OpenMP that torch has loaded: GOMP_parallel and omp_get_thread_num.
typedef struct {
    void (*start)(void (*function)(void *), void *data, unsigned threads, unsigned flags);
    int (*number)(void);
} Team;

typedef struct { int64_t next, end; char line[48]; } Share;  // of the items; a cache line of its own

typedef struct Job {
    void (*work)(const struct Job *job, int64_t item, char *scratch);
    const void *plan;
    const float *x, *add;
    float *y;
    const int64_t *cuts;
    int64_t items, pieces, per_worker;  // per_worker: bytes of scratch
    int64_t cleared;  // bytes of it that are set to zero first: lanes that belong to no output are computed with too
    char *scratch;
    const Team *team;  // null for one thread
    int64_t threads;
    Share *share;  // of each thread
} Job;

static void run_worker(void *data) {
    const Job *job = data;
    int64_t worker = job->team ? job->team->number() : 0;
    if (worker >= job->threads) return;
    char *scratch = job->scratch ? job->scratch + worker * job->per_worker : 0;
    if (scratch) memset(scratch, 0, job->cleared);
    for (int64_t i = 0; i < job->threads; i++) {
        Share *share = job->share + (worker + i) % job->threads;
        for (;;) {
            int64_t item = __atomic_fetch_add(&share->next, 1, __ATOMIC_RELAXED);
            if (item >= share->end) break;
            job->work(job, item, scratch);
        }
    }
}

#define MOST_THREADS 1024

static void run(Job *job, int64_t threads, const Team *team) {
    if (threads > job->items) threads = job->items;
    if (threads > MOST_THREADS) threads = MOST_THREADS;
    if (threads < 1 || !team) threads = 1;
    Share share[threads];
    for (int64_t i = 0; i < threads; i++) {
        share[i].next = job->items * i / threads;
        share[i].end = job->items * (i + 1) / threads;
    }
    job->threads = threads, job->share = share;
    job->team = threads > 1 ? team : 0;
    if (job->team) team->start(run_worker, job, (unsigned)threads, 0);
    else run_worker(job);
}

static int64_t round_up(int64_t count, int64_t to) { return (count + to - 1) / to * to; }

static char *aligned(char *at) { return at + (-(uintptr_t)at & 63); }

// A product of sizes; -1 if one is negative or the product is beyond 2^44, which no memory has. (The limit
// leaves room for a multiplication by sizes below 2^18 without overflow; larger sizes are refused one by
// one.)
#define LARGEST ((int64_t)1 << 44)
static int64_t times(int64_t a, int64_t b) {
    int64_t product;
    if (a < 0 || b < 0 || __builtin_mul_overflow(a, b, &product) || product > LARGEST) return -1;
    return product;
}

// Cuts split the outputs into pieces: 0 = cuts[0] <= ... <= cuts[pieces] = outputs.
static int good_cuts(const int64_t *cuts, int64_t pieces, int64_t outputs) {
    if (pieces < 1 || cuts[0] != 0 || cuts[pieces] != outputs) return 0;
    for (int64_t i = 0; i < pieces; i++) if (cuts[i] > cuts[i + 1]) return 0;
    return 1;
}


// --- convolution ---------------------------------------------------------------------------------

typedef struct {
    int64_t first_channel, end_channel;  // of the input, that the panel holds at once
    int64_t first_output, end_output;  // that read them: all of a group, or of several whole groups
    int64_t begins;  // where the begins of its outputs are: begins[0] to begins[outputs], into offsets and values
    int64_t opens, closes;  // 1 if no chunk before, or none after it, has the same outputs
} Chunk;

typedef struct {
    int64_t images, channels, height, width;
    int64_t outputs, out_height, out_width;
    int64_t kernel_width, stride_y, stride_x, dilation_x, top, left;  // top, left: of the padding
    int64_t rows, columns, abreast;  // a tile: rows × columns of outputs, of as many images abreast
    int64_t row_length, vectors;  // floats of a row in the panel; vectors of a tile in registers
    int64_t panel_rows, panel_channels, chunks, begins, nonzeros, most_outputs, activation;
    int64_t transposed;  // 1 for a map of one row whose places come first in memory, then channels: items of a Linear
    const int64_t *input_rows;  // of each panel row, relative to the tile's first
    const Chunk *chunk;
    const uint8_t *used;  // of each channel and column of the kernel: whether any weight reads it; others are not packed
    const int32_t *begin;
    const uint16_t *offset;  // in floats from the panel's begin
    const float *value;
    const float *bias;  // or null
} Convolution;

// One block of LANES columns in a row of the panel.
typedef struct {
    VectorMask inside;  // lanes that are columns of the image and of the tile
    int64_t from;  // the first lane's column in the image, may be negative
    int64_t low, high;  // lanes inside
} Move;

static int64_t blocks_of(const Convolution *p) { return (p->columns + LANES - 1) / LANES; }

// what a column of the kernel reads of a channel; the next one begins with a whole vector, or more loads are
// misaligned
static int64_t plane_floats(const Convolution *p) { return round_up(p->panel_rows * p->row_length, LANES); }
static int64_t channel_floats(const Convolution *p) { return p->kernel_width * plane_floats(p); }
static int64_t tile_floats(const Convolution *p) { return p->vectors * LANES; }
static int64_t moves_bytes(const Convolution *p) {
    return round_up(p->kernel_width * blocks_of(p) * sizeof(Move), 64);
}

// a block may write beyond its row, and a tile read beyond its last one: two vectors stand behind the panel
static int64_t panel_bytes(const Convolution *p) {
    return round_up(4 * (p->panel_channels * channel_floats(p) + 2 * LANES), 64);
}

static int64_t worker_bytes(const Convolution *p) {
    return moves_bytes(p) + panel_bytes(p) + 4 * p->most_outputs * tile_floats(p) + 128;
}

typedef void (*Accumulate)(const float *panel, float *sums, const int32_t *begin, int64_t outputs,
                           const uint16_t *offset, const float *value, int opens);

// Add to the tiles of `outputs` channels what the weights of one chunk make of the panel. A multiplication
// waits four cycles for the one before it on the same register, so the smallest tiles have several registers
// a vector: WAYS.
#define ACCUMULATE(T, WAYS) \
static void accumulate_##T(const float *restrict panel, float *restrict sums, const int32_t *restrict begin, \
                           int64_t outputs, const uint16_t *restrict offset, const float *restrict value, \
                           int opens) { \
    for (int64_t o = 0; o < outputs; o++, sums += T * LANES) { \
        Vector sum[WAYS][T]; \
        int64_t k = begin[o], end = begin[o + 1]; \
        if (k == end && !opens) continue; \
        if (opens) { UNROLL for (int t = 0; t < T; t++) sum[0][t] = (Vector){0}; } \
        else { UNROLL for (int t = 0; t < T; t++) sum[0][t] = *(const Vector *)(sums + t * LANES); } \
        UNROLL for (int w = 1; w < WAYS; w++) UNROLL for (int t = 0; t < T; t++) sum[w][t] = (Vector){0}; \
        for (; k + WAYS <= end; k += WAYS) { \
            UNROLL for (int w = 0; w < WAYS; w++) { \
                const float *at = panel + offset[k + w]; \
                Vector weight = value[k + w] - (Vector){0}; \
                UNROLL for (int t = 0; t < T; t++) sum[w][t] += weight * *(const Vector *)(at + t * LANES); \
            } \
        } \
        for (; k < end; k++) { \
            const float *at = panel + offset[k]; \
            Vector weight = value[k] - (Vector){0}; \
            UNROLL for (int t = 0; t < T; t++) sum[0][t] += weight * *(const Vector *)(at + t * LANES); \
        } \
        UNROLL for (int w = 1; w < WAYS; w++) UNROLL for (int t = 0; t < T; t++) sum[0][t] += sum[w][t]; \
        UNROLL for (int t = 0; t < T; t++) *(Vector *)(sums + t * LANES) = sum[0][t]; \
    } \
}
ACCUMULATE(1, 4) ACCUMULATE(2, 2) ACCUMULATE(3, 2) ACCUMULATE(4, 1) ACCUMULATE(5, 1) ACCUMULATE(6, 1)
ACCUMULATE(7, 1) ACCUMULATE(8, 1) ACCUMULATE(9, 1) ACCUMULATE(10, 1) ACCUMULATE(11, 1) ACCUMULATE(12, 1)
ACCUMULATE(13, 1) ACCUMULATE(14, 1)
#if MANY_REGISTERS
ACCUMULATE(16, 1) ACCUMULATE(18, 1) ACCUMULATE(20, 1) ACCUMULATE(21, 1) ACCUMULATE(24, 1) ACCUMULATE(28, 1)
#endif

static const Accumulate ACCUMULATES[] = {
    0, accumulate_1, accumulate_2, accumulate_3, accumulate_4, accumulate_5, accumulate_6, accumulate_7,
    accumulate_8, accumulate_9, accumulate_10, accumulate_11, accumulate_12, accumulate_13, accumulate_14,
#if MANY_REGISTERS
    0, accumulate_16, 0, accumulate_18, 0, accumulate_20, accumulate_21,
    0, 0, accumulate_24, 0, 0, 0, accumulate_28,
#endif
};
#define MOST_VECTORS ((int64_t)(sizeof(ACCUMULATES) / sizeof(ACCUMULATES[0])) - 1)

int64_t lanes(void) { return LANES; }

int64_t has_tile(int64_t vectors) {
    return vectors >= 1 && vectors <= MOST_VECTORS && ACCUMULATES[vectors] != 0;
}

// Say for each column of the kernel and block of columns which lanes are inside the image and the tile.
static void find_moves(const Convolution *p, int64_t x0, Move *move) {
    int64_t blocks = blocks_of(p), columns = p->columns, s = p->stride_x;
    if (x0 + columns > p->out_width) columns = p->out_width - x0;
    for (int64_t k = 0; k < p->kernel_width; k++) for (int64_t b = 0; b < blocks; b++, move++) {
        int64_t from = s * (x0 + b * LANES) + k * p->dilation_x - p->left;
        int64_t low = from < 0 ? (-from + s - 1) / s : 0;
        int64_t high = p->width > from ? (p->width - from + s - 1) / s : 0;
        if (high > columns - b * LANES) high = columns - b * LANES;
        if (high > LANES) high = LANES;
        if (low > high) low = high;  // nothing is inside
        if (high < 0) low = high = 0;
        move->from = from, move->low = low, move->high = high;
        for (int64_t i = 0; i < LANES; i++) move->inside[i] = -(int32_t)(i >= low && i < high);
    }
}

#if LANES == 16
#define EVEN 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#elif LANES == 8
#define EVEN 0, 2, 4, 6, 8, 10, 12, 14
#else
#define EVEN 0, 2, 4, 6
#endif

// Move one block. Where whole vectors may be read (`whole`) they are, and lanes outside become zero.
INLINE void move_block(float *to, const float *row, const Move *move, int64_t stride, int whole) {
    const float *from = row + move->from;
    if (whole && stride == 1) {
        *(Vector *)to = (Vector)(*(const VectorMask *)from & move->inside);
    } else if (whole && stride == 2) {
        Vector both = __builtin_shufflevector(*(const Vector *)from, *(const Vector *)(from + LANES), EVEN);
        *(Vector *)to = (Vector)((VectorMask)both & move->inside);
    } else {
        *(Vector *)to = (Vector){0};
        for (int64_t i = move->low; i < move->high; i++) to[i] = row[move->from + i * stride];
    }
}

#define MOST_ROWS 1024  // of a panel
#define MOST_ABREAST 64

typedef struct {
    const float *image[MOST_ABREAST];  // of each image abreast the chunk's first channel, or null
    int64_t whole_from, whole_to;  // channels of the chunk of which whole vectors may be read
    int64_t rows[MOST_ROWS];  // of each panel row: offset of the input's row, or -1
    int64_t first_row, last_row;  // the smallest and the largest of them
} Source;

// Vectors are written to the panel, and may be anything to the compiler: what is read between is in
// variables.
INLINE float *pack_channel(const Convolution *p, const Source *source, const uint8_t *used, int64_t plane,
                           const Move *moves, float *to, int64_t stride, int64_t blocks, int64_t abreast,
                           int whole) {
    const int64_t kernel_width = p->kernel_width, panel_rows = p->panel_rows;
    const int64_t columns = p->columns, row_length = p->row_length;
    const int64_t length = plane_floats(p);
    float *after = to;
    for (int64_t k = 0; k < kernel_width; k++, moves += blocks) {
        to = after, after += length;
        if (!used[k]) continue;
        for (int64_t r = 0; r < panel_rows; r++, to += row_length) {
            int64_t from = source->rows[r];
            for (int64_t q = 0; q < abreast; q++) {
                float *at = to + q * columns;
                const float *image = source->image[q];
                if (from < 0 || !image)
                    for (int64_t b = 0; b < blocks; b++) *(Vector *)(at + b * LANES) = (Vector){0};
                else
                    for (int64_t b = 0; b < blocks; b++)
                        move_block(at + b * LANES, image + plane + from, moves + b, stride, whole);
            }
        }
    }
    return after;
}

INLINE void pack_channels(const Convolution *p, const Source *source, const Chunk *chunk, const Move *moves,
                          float *to, int64_t stride, int64_t blocks, int64_t abreast) {
    const uint8_t *used = p->used + chunk->first_channel * p->kernel_width;
    int64_t channels = chunk->end_channel - chunk->first_channel;
    for (int64_t c = 0; c < channels; c++, used += p->kernel_width) {
        int64_t plane = c * p->height * p->width;
        if (c >= source->whole_from && c < source->whole_to)
            to = pack_channel(p, source, used, plane, moves, to, stride, blocks, abreast, 1);
        else
            to = pack_channel(p, source, used, plane, moves, to, stride, blocks, abreast, 0);
    }
}

// Fill the panel; the usual strides and numbers of blocks are constants to the compiler.
static void pack(const Convolution *p, const Source *source, const Chunk *chunk, const Move *moves, float *to) {
    int64_t blocks = blocks_of(p);
    #define PACK(condition, ...) if (condition) { pack_channels(p, source, chunk, moves, to, __VA_ARGS__); return; }
    PACK(p->stride_x == 1 && blocks == 1 && p->abreast == 1, 1, 1, 1)
    PACK(p->stride_x == 1 && blocks == 2 && p->abreast == 1, 1, 2, 1)
    PACK(p->stride_x == 1 && blocks == 4 && p->abreast == 1, 1, 4, 1)
    PACK(p->stride_x == 1 && blocks == 7 && p->abreast == 1, 1, 7, 1)
    PACK(p->stride_x == 1 && p->abreast == 1, 1, blocks, 1)
    PACK(p->stride_x == 1 && blocks == 1, 1, 1, p->abreast)
    PACK(p->stride_x == 1, 1, blocks, p->abreast)
    PACK(p->stride_x == 2 && blocks == 1, 2, 1, p->abreast)
    PACK(p->stride_x == 2 && blocks == 2, 2, 2, p->abreast)
    PACK(p->stride_x == 2, 2, blocks, p->abreast)
    PACK(1, p->stride_x, blocks, p->abreast)
    #undef PACK
}

// Find the channels of a chunk of which whole vectors may be read: such a read may leave its row, not the
// tensor.
static void find_whole(const Convolution *p, Source *source, int64_t before, const Move *moves) {
    int64_t plane = p->height * p->width, total = p->images * p->channels * plane;
    int64_t lowest = moves[0].from, reach = p->stride_x <= 2 ? p->stride_x * LANES : 1;
    int64_t highest = moves[p->kernel_width * blocks_of(p) - 1].from + reach;
    int64_t start = before + source->first_row + lowest, stop = before + source->last_row + highest;
    int64_t from = source->whole_from, to = source->whole_to;
    while (from < to && start + from * plane < 0) from++;
    while (to > from && stop + (to - 1) * plane > total) to--;
    source->whole_from = from, source->whole_to = to;
}

#define FINISH(Type, j) { \
    Type v = *(const Type *)(sums + (j)) + bias; \
    if (add) v += *(const Type *)(add + (j)); \
    ACTIVATE(Type, v, activation) \
    *(Type *)(y + (j)) = v; \
}

// Write n outputs: add a bias and a row of another tensor, and activate them.
// The last block overlaps the one before, so that no output is computed alone.
INLINE void finish_row(float *restrict y, const float *restrict sums, const float *restrict add,
                       int64_t n, float bias, int activation) {
    int64_t j = 0;
    if (n >= LANES) {
        for (; j + LANES <= n; j += LANES) FINISH(Vector, j)
        if (j < n) FINISH(Vector, n - LANES)
    } else if (n >= 8) {
        for (; j + 8 <= n; j += 8) FINISH(Half, j)
        if (j < n) FINISH(Half, n - 8)
    } else if (n >= 4) {
        for (; j + 4 <= n; j += 4) FINISH(Quarter, j)
        if (j < n) FINISH(Quarter, n - 4)
    } else for (; j < n; j++) {
        y[j] = activated(sums[j] + bias + (add ? add[j] : 0), activation);
    }
}

// Read four vectors of four numbers and turn them, so that the first ones are together, then the second ones.
INLINE void turn(const float *from, int64_t step, Quarter out[4]) {
    Quarter a = *(const Quarter *)from, b = *(const Quarter *)(from + step);
    Quarter c = *(const Quarter *)(from + 2 * step), d = *(const Quarter *)(from + 3 * step);
    Quarter ab = __builtin_shufflevector(a, b, 0, 4, 1, 5), cd = __builtin_shufflevector(c, d, 0, 4, 1, 5);
    Quarter AB = __builtin_shufflevector(a, b, 2, 6, 3, 7), CD = __builtin_shufflevector(c, d, 2, 6, 3, 7);
    out[0] = __builtin_shufflevector(ab, cd, 0, 1, 4, 5);
    out[1] = __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
    out[2] = __builtin_shufflevector(AB, CD, 0, 1, 4, 5);
    out[3] = __builtin_shufflevector(AB, CD, 2, 3, 6, 7);
}

// Fill the panel with a chunk's channels of items that lie one after the other.
static void pack_items(const Convolution *p, const float *x, int64_t first, int64_t items,
                       const Chunk *chunk, float *to) {
    const int64_t row_length = plane_floats(p), step = p->channels;
    const int64_t channels = chunk->end_channel - chunk->first_channel;
    int64_t j = 0;
    x += first * step + chunk->first_channel;
    for (; j + 4 <= items; j += 4, x += 4 * step) {
        int64_t c = 0;
        for (; c + 4 <= channels; c += 4) {
            Quarter turned[4];
            turn(x + c, step, turned);
            for (int i = 0; i < 4; i++) *(Quarter *)(to + (c + i) * row_length + j) = turned[i];
        }
        for (; c < channels; c++) for (int i = 0; i < 4; i++) to[c * row_length + j + i] = x[i * step + c];
    }
    for (; j < items; j++, x += step) for (int64_t c = 0; c < channels; c++) to[c * row_length + j] = x[c];
}

// Write outputs of items that lie one after the other, four items and four outputs at once.
INLINE void finish_items(const Convolution *p, float *y, const float *sums, int64_t first, int64_t end, int64_t items,
                         int activation) {
    const int64_t step = p->outputs, tile = tile_floats(p);
    const float *bias = p->bias;
    for (int64_t start = first; start < end; start += 16) {  // outputs of a cache line
        int64_t stop = start + 16 < end ? start + 16 : end, j = 0;
        for (; j + 4 <= items; j += 4) {
            int64_t o = start;
            for (; o + 4 <= stop; o += 4) {
                Quarter turned[4], add = bias ? *(const Quarter *)(bias + o) : (Quarter){0};
                turn(sums + (o - first) * tile + j, tile, turned);
                for (int i = 0; i < 4; i++) {
                    Quarter v = turned[i] + add;
                    ACTIVATE(Quarter, v, activation)
                    *(Quarter *)(y + (j + i) * step + o) = v;
                }
            }
            for (; o < stop; o++) for (int i = 0; i < 4; i++) {
                float v = sums[(o - first) * tile + j + i] + (bias ? bias[o] : 0);
                y[(j + i) * step + o] = activated(v, activation);
            }
        }
        for (; j < items; j++) for (int64_t o = start; o < stop; o++) {
            float v = sums[(o - first) * tile + j] + (bias ? bias[o] : 0);
            y[j * step + o] = activated(v, activation);
        }
    }
}

typedef struct { int64_t image, y, x; } Place;

static int64_t shares(int64_t count, int64_t size) { return (count + size - 1) / size; }

static int64_t tiles_of(const Convolution *p) {
    int64_t groups = shares(p->images, p->abreast);
    int64_t down = shares(p->out_height, p->rows), across = shares(p->out_width, p->columns);
    return times(times(groups, down), across);
}

static Place place_of(const Convolution *p, int64_t tile) {
    int64_t down = shares(p->out_height, p->rows), across = shares(p->out_width, p->columns);
    int64_t image = tile / (down * across), y = tile / across % down, x = tile % across;
    return (Place){image * p->abreast, y * p->rows, x * p->columns};
}

INLINE void finish_output(const Job *job, const Convolution *p, Place at, int64_t output, const float *sums,
                          int activation) {
    float bias = p->bias ? p->bias[output] : 0;
    int64_t columns = p->out_width - at.x < p->columns ? p->out_width - at.x : p->columns;
    int64_t rows = p->out_height - at.y < p->rows ? p->out_height - at.y : p->rows;
    if (p->columns == p->out_width && p->row_length == p->columns) {  // the rows of a tile lie side by side
        columns *= rows;
        rows = 1;
    }
    for (int64_t q = 0; q < p->abreast && at.image + q < p->images; q++) {
        int64_t first = (((at.image + q) * p->outputs + output) * p->out_height + at.y) * p->out_width + at.x;
        for (int64_t r = 0; r < rows; r++) {
            int64_t to = first + r * p->out_width;
            const float *add = job->add ? job->add + to : 0;
            finish_row(job->y + to, sums + r * p->row_length + q * p->columns, add, columns, bias, activation);
        }
    }
}

#define AHEAD 4  // outputs

// Ask for the memory of an output that is written soon: each output channel lies far from the one before.
INLINE void prepare_output(const Job *job, const Convolution *p, Place at, int64_t output) {
    for (int64_t q = 0; q < p->abreast && at.image + q < p->images; q++) {
        int64_t first = (((at.image + q) * p->outputs + output) * p->out_height + at.y) * p->out_width + at.x;
        for (int64_t r = 0; r < p->rows && at.y + r < p->out_height; r++) {
            const float *row = job->y + first + r * p->out_width;
            const float *add = job->add ? job->add + first + r * p->out_width : 0;
            for (int64_t i = 0; i < p->columns; i += 16) {
                __builtin_prefetch(row + i, 1, 3);
                if (add) __builtin_prefetch(add + i, 0, 3);
            }
        }
    }
}

// Say which rows of the input a tile reads.
static void find_rows(const Convolution *p, Place at, Source *source) {
    source->first_row = -1, source->last_row = 0;
    for (int64_t r = 0; r < p->panel_rows; r++) {
        int64_t row = p->stride_y * at.y - p->top + p->input_rows[r];
        source->rows[r] = row < 0 || row >= p->height ? -1 : row * p->width;
        if (source->rows[r] < 0) continue;
        if (source->first_row < 0 || source->rows[r] < source->first_row) source->first_row = source->rows[r];
        if (source->rows[r] > source->last_row) source->last_row = source->rows[r];
    }
    if (source->first_row < 0) source->first_row = 0;
}

// Say where the images of a chunk are.
static void find_images(const Job *job, Place at, const Chunk *chunk, const Move *moves, Source *source) {
    const Convolution *p = job->plan;
    source->whole_from = 0, source->whole_to = chunk->end_channel - chunk->first_channel;
    for (int64_t q = 0; q < p->abreast; q++) {
        int64_t before = ((at.image + q) * p->channels + chunk->first_channel) * p->height * p->width;
        source->image[q] = at.image + q < p->images ? job->x + before : 0;
        if (source->image[q]) find_whole(p, source, before, moves);
    }
}

static int64_t items_of(const Convolution *p, Place at) {
    return p->width - at.x < p->columns ? p->width - at.x : p->columns;
}

// Write the outputs from `first` to `end`, whose sums are complete.
INLINE void finish(const Job *job, Place at, int64_t first, int64_t end, const float *sums, int activation) {
    const Convolution *p = job->plan;
    if (p->transposed) {
        finish_items(p, job->y + at.x * p->outputs, sums, first, end, items_of(p, at), activation);
        return;
    }
    for (int64_t o = first; o < end; o++) {
        if (o + AHEAD < end) prepare_output(job, p, at, o + AHEAD);
        finish_output(job, p, at, o, sums + (o - first) * tile_floats(p), activation);
    }
}

// Compute one tile for one piece of the outputs.
static void convolve_item(const Job *job, int64_t item, char *scratch) {
    const Convolution *p = job->plan;
    const Accumulate accumulate = ACCUMULATES[p->vectors];
    int64_t tiles = job->items / job->pieces;
    int64_t first_output = job->cuts[item / tiles], end_output = job->cuts[item / tiles + 1];
    Place at = place_of(p, item % tiles);
    Move *moves = (Move *)aligned(scratch);
    float *panel = (float *)((char *)moves + moves_bytes(p));
    float *sums = (float *)((char *)panel + panel_bytes(p));
    Source source;

    find_moves(p, at.x, moves);
    find_rows(p, at, &source);
    for (int64_t c = 0; c < p->chunks; c++) {
        const Chunk *chunk = p->chunk + c;
        int64_t first = chunk->first_output > first_output ? chunk->first_output : first_output;
        int64_t end = chunk->end_output < end_output ? chunk->end_output : end_output;
        if (first >= end) continue;
        if (p->transposed) pack_items(p, job->x, at.x, items_of(p, at), chunk, panel);
        else {
            find_images(job, at, chunk, moves, &source);
            pack(p, &source, chunk, moves, panel);
        }
        const int32_t *begin = p->begin + chunk->begins + (first - chunk->first_output);
        accumulate(panel, sums, begin, end - first, p->offset, p->value, (int)chunk->opens);
        if (!chunk->closes) continue;
        if (p->activation == NONE) finish(job, at, first, end, sums, NONE);
        else if (p->activation == RELU) finish(job, at, first, end, sums, RELU);
        else finish(job, at, first, end, sums, RELU6);
    }
}

static int between(int64_t value, int64_t low, int64_t high) { return value >= low && value <= high; }

static int check_sizes(const Convolution *p) {
    const int64_t most = 1 << 24;  // of one size, so that no sum or product of two overflows
    int64_t sizes[] = {p->images, p->channels, p->height, p->width, p->outputs, p->out_height, p->out_width,
                       p->kernel_width, p->stride_y, p->stride_x, p->dilation_x, p->rows, p->columns};
    for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) if (!between(sizes[i], 1, most)) return 0;
    if (!between(p->top, 0, most) || !between(p->left, 0, most)) return 0;
    if (times(times(p->images, p->channels), times(p->height, p->width)) < 0) return 0;
    return times(times(p->images, p->outputs), times(p->out_height, p->out_width)) >= 0;
}

// Places that come first are those of one row, each read once.
static int check_transposed(const Convolution *p) {
    if (p->images != 1 || p->height != 1 || p->kernel_width != 1 || p->rows != 1 || p->abreast != 1) return 0;
    if (p->panel_rows != 1 || p->stride_x != 1 || p->top || p->left) return 0;
    return p->out_height == 1 && p->out_width == p->width;
}

static int check_tile(const Convolution *p) {
    if (p->transposed && !check_transposed(p)) return 0;
    if (!has_tile(p->vectors) || !between(p->abreast, 1, MOST_ABREAST)) return 0;
    if (!between(p->panel_rows, 1, MOST_ROWS) || !between(p->panel_channels, 1, p->channels)) return 0;
    if (!between(p->row_length, times(p->abreast, p->columns), 1 << 16)) return 0;
    if (times(p->rows, p->row_length) < 0 || p->rows * p->row_length > tile_floats(p)) return 0;
    if (times(times(p->kernel_width, plane_floats(p)), p->panel_channels) < 0) return 0;
    if (times(p->kernel_width * blocks_of(p), sizeof(Move)) < 0) return 0;
    if (!between(p->most_outputs, 1, p->outputs)) return 0;
    for (int64_t r = 0; r < p->panel_rows; r++) if (!between(p->input_rows[r], 0, 1 << 24)) return 0;
    return 1;
}

static int check_chunk(const Convolution *p, const Chunk *chunk) {
    int64_t outputs = chunk->end_output - chunk->first_output;
    int64_t channels = chunk->end_channel - chunk->first_channel;
    if (chunk->first_output < 0 || chunk->end_output > p->outputs) return BAD_CHUNK;
    if (chunk->first_channel < 0 || chunk->end_channel > p->channels) return BAD_CHUNK;
    if (!between(outputs, 1, p->most_outputs) || !between(channels, 1, p->panel_channels)) return BAD_CHUNK;
    if (chunk->begins < 0 || chunk->begins > p->begins - outputs - 1) return BAD_CHUNK;
    const int32_t *begin = p->begin + chunk->begins;
    int64_t furthest = channels * channel_floats(p) + LANES - tile_floats(p);
    if (begin[0] < 0 || begin[outputs] > p->nonzeros) return BAD_CHUNK;
    for (int64_t o = 0; o < outputs; o++) {
        if (begin[o] > begin[o + 1]) return BAD_CHUNK;
    }
    for (int64_t k = begin[0]; k < begin[outputs]; k++) if (p->offset[k] > furthest) return BAD_OFFSET;
    return FINE;
}

// Check a plan once, when it is made: with it, no call reads or writes outside of the tensors and the
// scratch.
int64_t check_convolution(const Convolution *p) {
    if (!check_sizes(p)) return BAD_SIZE;
    if (!check_tile(p)) return BAD_TILE;
    if (p->chunks < 0 || p->begins < 0 || p->nonzeros < 0) return BAD_CHUNK;
    for (int64_t c = 0; c < p->chunks; c++) {
        int64_t refused = check_chunk(p, p->chunk + c);
        if (refused) return refused;
    }
    return FINE;
}

// Return the bytes of scratch that each thread needs.
int64_t convolution_scratch(const Convolution *p) { return round_up(worker_bytes(p), 64); }

int64_t convolution_tiles(const Convolution *p) { return tiles_of(p); }

// Compute y = activation(convolution(x) + bias + add); the plan was checked, lengths are in floats.
int64_t convolve(const Convolution *p, const float *x, int64_t x_length, float *y, int64_t y_length,
                 const float *add, const int64_t *cuts, int64_t pieces, char *scratch, int64_t scratch_bytes,
                 int64_t threads, const Team *team) {
    if (x_length != p->images * p->channels * p->height * p->width) return BAD_LENGTH;
    if (y_length != p->images * p->outputs * p->out_height * p->out_width) return BAD_LENGTH;
    if (!good_cuts(cuts, pieces, p->outputs)) return BAD_CUT;
    if (p->transposed && add) return BAD_LENGTH;  // not computed
    if (threads < 1 || times(threads, convolution_scratch(p)) < 0) return SMALL_SCRATCH;
    if (threads * convolution_scratch(p) > scratch_bytes) return SMALL_SCRATCH;
    Job job = {.work = convolve_item, .plan = p, .x = x, .add = add, .y = y, .cuts = cuts,
               .items = tiles_of(p) * pieces, .pieces = pieces,
               .per_worker = convolution_scratch(p), .scratch = scratch,
               .cleared = moves_bytes(p) + panel_bytes(p) + 64};
    run(&job, threads, team);
    return FINE;
}


// --- matrix-vector product -----------------------------------------------------------------------

typedef struct {
    int64_t inputs, outputs, nonzeros, wide, activation;  // wide: columns have 32 bits, else 16
    const int32_t *begin;  // outputs + 1
    const void *column;
    const float *value;
    const float *bias;  // or null
} Matrix;

// One sum for each lane; the compiler gathers as the processor does it best.
#define DOT(Type) { \
    const Type *column = (const Type *)p->column; \
    for (; k + LANES <= end; k += LANES) { \
        Vector read; \
        UNROLL for (int i = 0; i < LANES; i++) read[i] = x[column[k + i]]; \
        sums += read * *(const Vector *)(value + k); \
    } \
    for (; k < end; k++) rest += value[k] * x[column[k]]; \
}

INLINE float dot(const Matrix *p, const float *restrict x, int64_t k, int64_t end) {
    const float *value = p->value;
    Vector sums = {0};
    float rest = 0;
    if (p->wide) DOT(uint32_t) else DOT(uint16_t)
    for (int i = 0; i < LANES; i++) rest += sums[i];
    return rest;
}

static void multiply_item(const Job *job, int64_t item, char *scratch) {
    const Matrix *p = job->plan;
    (void)scratch;
    int64_t vector = item / job->pieces, piece = item % job->pieces;
    const float *x = job->x + vector * p->inputs;
    float *y = job->y + vector * p->outputs;
    for (int64_t o = job->cuts[piece]; o < job->cuts[piece + 1]; o++) {
        float sum = dot(p, x, p->begin[o], p->begin[o + 1]) + (p->bias ? p->bias[o] : 0);
        y[o] = activated(sum, p->activation);
    }
}

int64_t check_matrix(const Matrix *p) {
    if (p->inputs < 1 || p->outputs < 1 || p->nonzeros < 0) return BAD_SIZE;
    if (p->begin[0] != 0 || p->begin[p->outputs] != p->nonzeros) return BAD_CHUNK;
    for (int64_t o = 0; o < p->outputs; o++) if (p->begin[o] > p->begin[o + 1]) return BAD_CHUNK;
    for (int64_t k = 0; k < p->nonzeros; k++) {
        int64_t column = p->wide ? ((const uint32_t *)p->column)[k] : ((const uint16_t *)p->column)[k];
        if (column >= p->inputs) return BAD_OFFSET;
    }
    return FINE;
}

// Compute y = activation(matrix @ x + bias) for each of `vectors` rows x; the matrix was checked.
int64_t multiply(const Matrix *p, const float *x, int64_t x_length, float *y, int64_t y_length, int64_t vectors,
                 const int64_t *cuts, int64_t pieces, int64_t threads, const Team *team) {
    if (vectors < 1 || x_length != times(vectors, p->inputs)) return BAD_LENGTH;
    if (y_length != times(vectors, p->outputs)) return BAD_LENGTH;
    if (!good_cuts(cuts, pieces, p->outputs)) return BAD_CUT;
    Job job = {.work = multiply_item, .plan = p, .x = x, .y = y, .cuts = cuts,
               .items = vectors * pieces, .pieces = pieces};
    run(&job, threads, team);
    return FINE;
}


// --- max pooling ---------------------------------------------------------------------------------

typedef struct {
    int64_t planes, height, width, out_height, out_width;
    int64_t kernel_y, kernel_x, stride_y, stride_x, dilation_y, dilation_x, top, left;
} Pool;

// floats of a row that a row of outputs reads, with the padding
static int64_t pool_floats(const Pool *p) {
    int64_t reach = (p->out_width - 1) * p->stride_x + (p->kernel_x - 1) * p->dilation_x + 1;
    return reach > p->left + p->width ? reach : p->left + p->width;
}

// the larger of two, and NaN if one is, as torch does
INLINE float larger(float a, float b) { return b > a || b != b ? b : a; }

INLINE void pool_columns(float *restrict y, const float *restrict row, int64_t n, int64_t kernel, int64_t stride,
                         int64_t dilation) {
    for (int64_t j = 0; j < n; j++) y[j] = row[j * stride];
    for (int64_t k = 1; k < kernel; k++)
        for (int64_t j = 0; j < n; j++) y[j] = larger(y[j], row[j * stride + k * dilation]);
}

INLINE Vector larger_of(Vector a, Vector b) {
    VectorMask takes = (VectorMask)(b > a) | (VectorMask)(b != b);
    return (Vector)(((VectorMask)b & takes) | ((VectorMask)a & ~takes));
}

// the usual kernel, 3 with stride 2
INLINE void pool_three(float *restrict y, const float *restrict row, int64_t n) {
    int64_t j = 0;
    for (; j + LANES < n; j += LANES) {
        Vector at[3];
        UNROLL for (int k = 0; k < 3; k++) {
            const float *from = row + 2 * j + k;
            at[k] = __builtin_shufflevector(*(const Vector *)from, *(const Vector *)(from + LANES), EVEN);
        }
        *(Vector *)(y + j) = larger_of(larger_of(at[0], at[1]), at[2]);
    }
    for (; j < n; j++) y[j] = larger(larger(row[2 * j], row[2 * j + 1]), row[2 * j + 2]);
}

// Take the largest of each column, of the rows of the input that a row of the output reads.
INLINE void pool_rows(const Pool *p, const float *x, int64_t i, float *restrict inside) {
    int64_t first = i * p->stride_y - p->top, step = p->dilation_y, rows = p->kernel_y;
    for (; rows > 0 && first < 0; rows--) first += step;
    while (rows > 0 && first + (rows - 1) * step >= p->height) rows--;
    const float *restrict a = x + first * p->width;
    if (rows == 3) {
        const float *restrict b = a + step * p->width, *restrict c = b + step * p->width;
        for (int64_t j = 0; j < p->width; j++) inside[j] = larger(larger(a[j], b[j]), c[j]);
        return;
    }
    for (int64_t j = 0; j < p->width; j++) inside[j] = rows ? a[j] : -__builtin_inff();
    for (int64_t k = 1; k < rows; k++) {
        const float *restrict b = a + k * step * p->width;
        for (int64_t j = 0; j < p->width; j++) inside[j] = larger(inside[j], b[j]);
    }
}

static void pool_item(const Job *job, int64_t item, char *scratch) {
    const Pool *p = job->plan;
    float *row = (float *)aligned(scratch), *inside = row + p->left;
    int64_t floats = pool_floats(p);
    const float *x = job->x + item * p->height * p->width;
    float *y = job->y + item * p->out_height * p->out_width;
    for (int64_t j = 0; j < floats; j++) row[j] = -__builtin_inff();
    for (int64_t i = 0; i < p->out_height; i++, y += p->out_width) {
        pool_rows(p, x, i, inside);
        if (p->kernel_x == 3 && p->stride_x == 2 && p->dilation_x == 1) pool_three(y, row, p->out_width);
        else if (p->stride_x == 1) pool_columns(y, row, p->out_width, p->kernel_x, 1, p->dilation_x);
        else if (p->stride_x == 2) pool_columns(y, row, p->out_width, p->kernel_x, 2, p->dilation_x);
        else pool_columns(y, row, p->out_width, p->kernel_x, p->stride_x, p->dilation_x);
    }
}

static int check_pool(const Pool *p) {
    const int64_t most = 1 << 24;
    int64_t sizes[] = {p->height, p->width, p->out_height, p->out_width, p->kernel_y, p->kernel_x,
                       p->stride_y, p->stride_x, p->dilation_y, p->dilation_x};
    for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) if (!between(sizes[i], 1, most)) return 0;
    if (!between(p->top, 0, most) || !between(p->left, 0, most) || p->planes < 1) return 0;
    if (times(p->planes, times(p->height, p->width)) < 0) return 0;
    return times(p->planes, times(p->out_height, p->out_width)) > 0;
}

// Return the bytes of scratch that each thread needs, or 0 if the sizes are none.
int64_t pool_scratch(const Pool *p) { return check_pool(p) ? round_up(4 * pool_floats(p) + 64, 64) : 0; }

int64_t max_pool(const Pool *p, const float *x, int64_t x_length, float *y, int64_t y_length,
                 char *scratch, int64_t scratch_bytes, int64_t threads, const Team *team) {
    int64_t needed = pool_scratch(p);
    if (!needed) return BAD_SIZE;
    if (x_length != p->planes * p->height * p->width) return BAD_LENGTH;
    if (y_length != p->planes * p->out_height * p->out_width) return BAD_LENGTH;
    if (threads < 1 || times(threads, needed) < 0 || threads * needed > scratch_bytes) return SMALL_SCRATCH;
    Job job = {.work = pool_item, .plan = p, .x = x, .y = y, .items = p->planes, .pieces = 1,
               .per_worker = needed, .scratch = scratch};
    run(&job, threads, team);
    return FINE;
}


// --- chains --------------------------------------------------------------------------------------

enum Kind { CONVOLUTION, MATRIX, POOL };

typedef struct {
    int64_t kind;
    const void *plan;
    int64_t x, x_length, y, y_length, add;  // x, y, add: numbers of memories; add: -1 for none
    int64_t vectors;  // of a matrix
    const int64_t *cuts;
    int64_t pieces;
} Step;

// A batch may pass in slabs of some images, each through all steps before the next: what a slab has written
// is still in the cache when it is read. Then each thread has slabs of its own, and waits for no other.
typedef struct {
    const Step *step;
    int64_t steps, slabs;
    int64_t shared;  // memories, the first ones: inputs and outputs, of all slabs; of the others each worker has its own
    int64_t between;  // bytes of a worker's own memories, at the begin of its scratch; whole cache lines
    const int64_t *floats;  // of a shared memory: what a slab has of it; of another one: where it begins
    float *const *memory;  // the shared ones
} Chain;

typedef struct {
    const Chain *chain;
    int64_t scratch;  // bytes for the steps of one worker
    int64_t refused;  // by any step
} Passing;

static float *memory_of(const Chain *c, int64_t number, int64_t slab, char *own) {
    if (number < c->shared) return c->memory[number] + slab * c->floats[number];
    return (float *)own + c->floats[number];
}

static int64_t run_steps(const Chain *c, int64_t slab, char *own, int64_t scratch_bytes, int64_t threads,
                         const Team *team) {
    char *scratch = own + c->between;
    for (const Step *s = c->step; s < c->step + c->steps; s++) {
        const float *x = memory_of(c, s->x, slab, own);
        const float *add = s->add < 0 ? 0 : memory_of(c, s->add, slab, own);
        float *y = memory_of(c, s->y, slab, own);
        int64_t refused = BAD_SIZE;
        if (s->kind == CONVOLUTION)
            refused = convolve(s->plan, x, s->x_length, y, s->y_length, add, s->cuts, s->pieces,
                               scratch, scratch_bytes, threads, team);
        else if (s->kind == MATRIX)
            refused = multiply(s->plan, x, s->x_length, y, s->y_length, s->vectors, s->cuts, s->pieces, threads, team);
        else if (s->kind == POOL)
            refused = max_pool(s->plan, x, s->x_length, y, s->y_length, scratch, scratch_bytes, threads, team);
        if (refused) return refused;
    }
    return FINE;
}

static void pass_slab(const Job *job, int64_t slab, char *scratch) {
    Passing *passing = (Passing *)job->plan;
    int64_t refused = run_steps(passing->chain, slab, scratch, passing->scratch, 1, 0);
    if (refused) __atomic_store_n(&passing->refused, refused, __ATOMIC_RELAXED);
}

// Run plans one after the other, in memories that one writes and a later one reads.
int64_t run_chain(const Chain *c, char *scratch, int64_t scratch_bytes, int64_t threads, const Team *team) {
    if (c->slabs < 1 || threads < 1 || c->between < 0) return BAD_SIZE;
    if (c->slabs == 1) {
        if (scratch_bytes < c->between) return SMALL_SCRATCH;
        return run_steps(c, 0, scratch, scratch_bytes - c->between, threads, team);
    }
    int64_t per_worker = scratch_bytes / threads / 64 * 64;
    if (per_worker < c->between) return SMALL_SCRATCH;
    Passing passing = {c, per_worker - c->between, FINE};
    Job job = {.work = pass_slab, .plan = &passing, .items = c->slabs, .pieces = 1,
               .per_worker = per_worker, .scratch = scratch};
    run(&job, threads, team);
    return passing.refused;
}


// --- peak ----------------------------------------------------------------------------------------

#define CHAINS 12  // enough that no multiplication waits for another

// Multiply and add in registers alone, `rounds` times; return the floating-point operations that this takes.
int64_t compute(int64_t rounds, float *out) {
    Vector sum[CHAINS], factor = out[0] - (Vector){0};
    UNROLL for (int c = 0; c < CHAINS; c++) sum[c] = factor + (float)c;
    for (int64_t i = 0; i < rounds; i++) {
        UNROLL for (int c = 0; c < CHAINS; c++) sum[c] = sum[c] * factor + factor;
        __asm__ volatile("" ::: "memory");
    }
    UNROLL for (int c = 1; c < CHAINS; c++) sum[0] += sum[c];
    *out = sum[0][0];
    return rounds * CHAINS * LANES * 2;
}
