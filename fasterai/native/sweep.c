// What an event does to every weight: compare its score with a bracket, count zeros, mask.
//
// Nothing is allocated here and no library is linked: the caller gives all memory, and the function that
// starts threads. Every function that is exported checks sizes before it writes, and returns a number that is
// not negative, or one of `enum Refused`. numpy and torch compute the same, to the bit: no score is the
// result of more than one rounding in another order.
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define BLOCK 64  // weights that are compared together; the compiler makes vectors of them
#define CHUNK 32768  // weights that a thread takes at once; a multiple of BLOCK
#define ROOM 4096  // weights of a chunk that may be inside the bracket
#define LARGEST ((int64_t)1 << 44)  // bytes, which no memory has

enum Refused { BAD_SIZE = -1, BAD_FORM = -2, NOT_FINITE = -3, TOO_MANY = -4 };


// --- threads -------------------------------------------------------------------------------------
// Threads take the next chunk by one counter: where the system lets one wait, the others go on.

// Functions of the OpenMP that torch has loaded: GOMP_parallel and omp_get_thread_num. Null for one thread.
typedef struct {
    void (*start)(void (*function)(void *), void *data, unsigned threads, unsigned flags);
    int (*number)(void);
} Team;

typedef struct {
    void (*work)(void *task, int64_t chunk);
    void *task;
    int64_t chunks, next;
} Job;

static void run_worker(void *data) {
    Job *job = data;
    for (;;) {
        int64_t chunk = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED);
        if (chunk >= job->chunks) return;
        job->work(job->task, chunk);
    }
}

static void run(void (*work)(void *, int64_t), void *task, int64_t chunks, int64_t threads, const Team *team) {
    Job job = {work, task, chunks, 0};
    if (threads > chunks) threads = chunks;
    if (threads > 1 && team) team->start(run_worker, &job, (unsigned)threads, 0);
    else run_worker(&job);
}

static int64_t chunks_of(int64_t length) { return (length + CHUNK - 1) / CHUNK; }

static int good_length(int64_t length) { return length >= 0 && length <= LARGEST; }


// --- sweep ---------------------------------------------------------------------------------------

// How a score is computed: a, |a|, a², |a·b| or a / divisor.
enum Form { PLAIN, ABSOLUTE, SQUARE, PRODUCT, QUOTIENT, FORMS };

typedef struct {
    int64_t form, length;
    const float *a, *b;  // b: null but for PRODUCT
    const float *weight;  // or null; else the score of a weight that is zero is -inf
    const uint8_t *alive;  // or null where all are
    float divisor, low, high;  // the bracket: low <= score <= high
    uint8_t *keep;  // of `length`: 1 for what is alive and above the bracket
    int64_t *at;  // where the scores inside the bracket are; of `room`
    float *inside;  // these scores; of `room`
    int64_t *counts;  // of `count_room`: two for each chunk
    int64_t room, count_room;
} Sweep;

INLINE float score_of(const Sweep *s, int64_t i, int form) {
    if (form == ABSOLUTE) return __builtin_fabsf(s->a[i]);
    if (form == SQUARE) return s->a[i] * s->a[i];
    if (form == PRODUCT) return __builtin_fabsf(s->a[i] * s->b[i]);
    if (form == QUOTIENT) return s->a[i] / s->divisor;
    return s->a[i];
}

typedef struct { int64_t found, kept, wrong; } Count;

// Pack 64 bytes that are 0 or 1 to bits: a product moves eight of them to its highest byte.
INLINE uint64_t bits_of(const uint8_t *bytes) {
    uint64_t bits = 0;
    for (int word = 0; word < BLOCK / 8; word++) {
        uint64_t eight;
        memcpy(&eight, bytes + 8 * word, 8);
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
        eight = __builtin_bswap64(eight);
#endif
        bits |= (eight * 0x0102040810204080) >> 56 << (8 * word);
    }
    return bits;
}

INLINE void sweep_block(const Sweep *s, int64_t begin, int64_t size, int form, int64_t first, Count *count) {
    float score[BLOCK];
    uint8_t inside[BLOCK] = {0};
    const float low = s->low, high = s->high;
    uint8_t *restrict keep = s->keep + begin;
    int wrong = 0, kept = 0;
    for (int64_t i = 0; i < size; i++) {
        score[i] = score_of(s, begin + i, form);
        wrong |= !(score[i] < __builtin_inff());
    }
    if (s->weight) {
        const float *weight = s->weight + begin;
        for (int64_t i = 0; i < size; i++) score[i] = weight[i] == 0 ? -__builtin_inff() : score[i];
    }
    if (s->alive) {
        const uint8_t *alive = s->alive + begin;
        for (int64_t i = 0; i < size; i++) {
            int lives = alive[i] != 0, above = (score[i] > high) & lives, reached = (score[i] >= low) & lives;
            keep[i] = (uint8_t)above, inside[i] = (uint8_t)(reached ^ above), kept += above;
        }
    } else {
        for (int64_t i = 0; i < size; i++) {
            int above = score[i] > high, reached = score[i] >= low;
            keep[i] = (uint8_t)above, inside[i] = (uint8_t)(reached ^ above), kept += above;
        }
    }
    count->wrong |= wrong;
    count->kept += kept;
    uint64_t bits = bits_of(inside);
    int64_t found = count->found;
    if ((count->found += __builtin_popcountll(bits)) > ROOM) return;
    for (; bits; bits &= bits - 1, found++) {
        int64_t i = __builtin_ctzll(bits);
        s->at[first + found] = begin + i;
        s->inside[first + found] = score[i];
    }
}

#define SWEEP(FORM) \
static void sweep_##FORM(void *task, int64_t chunk) { \
    const Sweep *s = task; \
    int64_t begin = chunk * CHUNK, end = begin + CHUNK < s->length ? begin + CHUNK : s->length; \
    Count count = {0, 0, 0}; \
    for (; begin + BLOCK <= end; begin += BLOCK) sweep_block(s, begin, BLOCK, FORM, chunk * ROOM, &count); \
    if (begin < end) sweep_block(s, begin, end - begin, FORM, chunk * ROOM, &count); \
    s->counts[2 * chunk] = count.wrong ? NOT_FINITE : count.found > ROOM ? TOO_MANY : count.found; \
    s->counts[2 * chunk + 1] = count.kept; \
}
SWEEP(PLAIN) SWEEP(ABSOLUTE) SWEEP(SQUARE) SWEEP(PRODUCT) SWEEP(QUOTIENT)

static void (*const SWEEPS[])(void *, int64_t) = {
    sweep_PLAIN, sweep_ABSOLUTE, sweep_SQUARE, sweep_PRODUCT, sweep_QUOTIENT,
};

// Put what the chunks have found one after the other.
static int64_t gather(const Sweep *s, int64_t chunks, int64_t *kept) {
    int64_t found = 0;
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        int64_t n = s->counts[2 * chunk];
        if (n < 0) return n;
        memmove(s->at + found, s->at + chunk * ROOM, n * sizeof(*s->at));
        memmove(s->inside + found, s->inside + chunk * ROOM, n * sizeof(*s->inside));
        found += n, *kept += s->counts[2 * chunk + 1];
    }
    return found;
}

// Return how many integers and floats of `at` and `inside` a sweep needs; `counts` needs half as many, or less.
int64_t sweep_room(int64_t length) { return good_length(length) ? chunks_of(length) * ROOM : BAD_SIZE; }

// Decide about all weights of a layer; return how many scores are inside the bracket, and in counts[0] how many
// weights are above it. NOT_FINITE: a score is NaN or infinite; TOO_MANY: more are inside than there is room for.
int64_t sweep(const Sweep *s, int64_t threads, const Team *team) {
    if (!good_length(s->length) || threads < 1) return BAD_SIZE;
    if (s->form < 0 || s->form >= FORMS || !s->a || (s->form == PRODUCT && !s->b)) return BAD_FORM;
    int64_t chunks = chunks_of(s->length), kept = 0;
    if (chunks < 1 || s->room < chunks * ROOM || s->count_room < 2 * chunks) return BAD_SIZE;
    run(SWEEPS[s->form], (void *)s, chunks, threads, team);
    int64_t found = gather(s, chunks, &kept);
    s->counts[0] = kept;
    return found;
}


// --- zeros ---------------------------------------------------------------------------------------

typedef struct {
    const float *weight;
    const uint8_t *keep;  // or null
    int64_t length, repeat, found;
} Zeros;

INLINE int zeros_in(const float *weight, int64_t begin, int64_t end) {
    int zeros = 0;
    for (int64_t i = begin; i < end; i++) zeros += weight[i] == 0;
    return zeros;
}

static void count_chunk(void *task, int64_t chunk) {
    Zeros *z = task;
    int64_t begin = chunk * CHUNK, end = begin + CHUNK < z->length ? begin + CHUNK : z->length;
    int zeros = 0;
    if (!z->keep) zeros = zeros_in(z->weight, begin, end);
    else if (z->repeat == 1)
        for (int64_t i = begin; i < end; i++) zeros += (z->weight[i] == 0) & (z->keep[i] != 0);
    else for (int64_t i = begin, next; i < end; i = next) {
        next = (i / z->repeat + 1) * z->repeat;
        if (next > end) next = end;
        if (z->keep[i / z->repeat]) zeros += zeros_in(z->weight, i, next);
    }
    __atomic_fetch_add(&z->found, zeros, __ATOMIC_RELAXED);
}

// Count the weights that are zero although the mask keeps them; each entry of `keep` says so of as many weights
// in a row as the lengths allow, and null that all are kept.
int64_t count_zeros(const float *weight, int64_t length, const uint8_t *keep, int64_t groups, int64_t threads,
                    const Team *team) {
    if (!good_length(length) || groups < 1 || length % groups || threads < 1) return BAD_SIZE;
    Zeros zeros = {weight, keep, length, length / groups, 0};
    run(count_chunk, &zeros, chunks_of(length), threads, team);
    return zeros.found;
}


// --- mask ----------------------------------------------------------------------------------------

typedef struct {
    uint32_t *weight;  // as bits, so that what is no number becomes zero too
    const uint8_t *keep;
    int64_t length, repeat;
} Masked;

// Weights that are zero already, as most are after a step, are not written again: writing is half of the cost.
INLINE void mask_block(uint32_t *restrict weight, const uint8_t *restrict keep, int64_t size) {
    uint32_t new[BLOCK], moved = 0;
    for (int64_t i = 0; i < size; i++) {
        new[i] = weight[i] & (0u - (uint32_t)(keep[i] != 0));
        moved |= new[i] ^ weight[i];
    }
    if (moved) memcpy(weight, new, size * sizeof(*weight));
}

static void mask_chunk(void *task, int64_t chunk) {
    const Masked *m = task;
    int64_t i = chunk * CHUNK, end = i + CHUNK < m->length ? i + CHUNK : m->length;
    for (; i + BLOCK <= end; i += BLOCK) mask_block(m->weight + i, m->keep + i, BLOCK);
    if (i < end) mask_block(m->weight + i, m->keep + i, end - i);
}

static void mask_groups(void *task, int64_t chunk) {
    const Masked *m = task;
    int64_t i = chunk * CHUNK, end = i + CHUNK < m->length ? i + CHUNK : m->length;
    while (i < end) {
        int64_t group = i / m->repeat, next = (group + 1) * m->repeat;
        if (next > end) next = end;
        if (!m->keep[group]) memset(m->weight + i, 0, (next - i) * sizeof(*m->weight));
        i = next;
    }
}

// Zero all weights but those that are kept; each entry of `keep` says so of as many weights in a row as the
// lengths allow.
int64_t mask(uint32_t *weight, int64_t length, const uint8_t *keep, int64_t groups, int64_t threads, const Team *team) {
    if (!good_length(length) || groups < 1 || length % groups || threads < 1) return BAD_SIZE;
    Masked masked = {weight, keep, length, length / groups};
    run(groups == length ? mask_chunk : mask_groups, &masked, chunks_of(length), threads, team);
    return 0;
}
