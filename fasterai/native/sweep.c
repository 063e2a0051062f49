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

enum Refused { BAD_SIZE = -1, BAD_FORM = -2, NOT_FINITE = -3, TOO_MANY = -4, MISSED = -5 };


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
    int64_t found, below;  // written by `cut`: number of scores inside the bracket, and of those below it
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

static int64_t refused(const Sweep *s) {
    if (!good_length(s->length) || s->length < 1) return BAD_SIZE;
    if (s->form < 0 || s->form >= FORMS || !s->a || (s->form == PRODUCT && !s->b) || !s->keep) return BAD_FORM;
    int64_t chunks = chunks_of(s->length);
    return s->room < chunks * ROOM || s->count_room < 2 * chunks ? BAD_SIZE : 0;
}

// Decide about all weights of a layer; return how many scores are inside the bracket, and in counts[0] how many
// weights are above it. NOT_FINITE: a score is NaN or infinite; TOO_MANY: more are inside than there is room for.
int64_t sweep(const Sweep *s, int64_t threads, const Team *team) {
    if (threads < 1) return BAD_SIZE;
    if (refused(s)) return refused(s);
    int64_t chunks = chunks_of(s->length), kept = 0;
    run(SWEEPS[s->form], (void *)s, chunks, threads, team);
    int64_t found = gather(s, chunks, &kept);
    s->counts[0] = kept;
    return found;
}


// --- cut -----------------------------------------------------------------------------------------
// Find the lowest weights of several layers, by (score, layer, position). A sample brackets the cut (Floyd & Rivest
// 1975), one sweep decides about all weights that are not inside, and those inside are ranked.

// An integer in the order of floats, but that -0 is below 0.
static uint32_t order_of(float score) {
    uint32_t bits;
    memcpy(&bits, &score, sizeof(bits));
    return bits >> 31 ? ~bits : bits | 0x80000000;
}

// Return the lowest score but k, by its digits: each pass over the scores finds the next one.
static float ranked(const float *scores, int64_t n, int64_t k) {
    enum { BITS = 11, BINS = 1 << BITS };
    uint64_t found = 0;  // 33 bits: three digits, of which the last is doubled
    for (int shift = 2 * BITS; shift >= 0; shift -= BITS) {
        int64_t counts[BINS] = {0};
        for (int64_t i = 0; i < n; i++) {
            uint64_t order = (uint64_t)order_of(scores[i]) << 1;
            if (order >> (shift + BITS) == found) counts[order >> shift & (BINS - 1)]++;
        }
        int digit = 0;
        while (k >= counts[digit]) k -= counts[digit++];
        found = found << BITS | (uint64_t)digit;
    }
    uint32_t bits = (uint32_t)(found >> 1);
    bits = bits >> 31 ? bits & 0x7fffffff : ~bits;
    float score;
    memcpy(&score, &bits, sizeof(score));
    return score;
}

typedef struct {
    Sweep *layers;
    const int64_t *first;  // the first chunk of each layer, of n + 1
    int64_t n;
    float score;  // the cut
} Layers;

// Return the layer of a chunk, and its number there.
static Sweep *layer_of(const Layers *all, int64_t *chunk) {
    int64_t layer = 0, above = all->n;
    while (above - layer > 1) {
        int64_t middle = (layer + above) / 2;
        if (all->first[middle] <= *chunk) layer = middle;
        else above = middle;
    }
    *chunk -= all->first[layer];
    return &all->layers[layer];
}

static void sweep_layers(void *task, int64_t chunk) {
    Sweep *s = layer_of(task, &chunk);
    SWEEPS[s->form](s, chunk);
}

INLINE float living_score(const Sweep *s, int64_t i, int *lives) {
    *lives = !s->alive || s->alive[i];
    return s->weight && s->weight[i] == 0 ? -__builtin_inff() : score_of(s, i, (int)s->form);
}

// Write the scores of every step-th weight that lives; return their number, at most `room`.
static int64_t sample(const Layers *all, int64_t step, float *scores, int64_t room) {
    int64_t found = 0, at = 0;
    for (int64_t layer = 0; layer < all->n; layer++) {
        const Sweep *s = &all->layers[layer];
        for (; at < s->length; at += step) {
            int lives;
            float score = living_score(s, at, &lives);
            if (lives && found < room) scores[found++] = score;
        }
        at -= s->length;
    }
    return found;
}

// The bracket: three standard errors around where the sample says that the budget ends.
static void bracket(Layers *all, const float *scores, int64_t n, double share) {
    double at = share * (double)n, error = 3 * __builtin_sqrt(at * (1 - share)) + 1;
    int64_t least = (int64_t)__builtin_floor(at - error), most = (int64_t)__builtin_ceil(at + error);
    float low = n && least >= 0 ? ranked(scores, n, least) : -__builtin_inff();
    float high = most < n ? ranked(scores, n, most) : __builtin_inff();
    for (int64_t layer = 0; layer < all->n; layer++) all->layers[layer].low = low, all->layers[layer].high = high;
}

// A piece of what is inside the bracket, of one layer: as many scores as a chunk has room for.
typedef struct {
    const float *scores;
    const int64_t *at;
    int64_t size, *ties, *lower;  // of scores that are the cut, and below it
} Piece;

static Piece piece_of(const Sweep *s, int64_t number) {
    int64_t begin = number * ROOM, size = s->found - begin;
    if (size > ROOM) size = ROOM;
    return (Piece){s->inside + begin, s->at + begin, size, s->counts + 2 * number, s->counts + 2 * number + 1};
}

static void count_piece(void *task, int64_t chunk) {
    const Layers *all = task;
    const Sweep *s = layer_of(all, &chunk);
    Piece piece = piece_of(s, chunk);
    int64_t ties = 0, lower = 0;
    for (int64_t i = 0; i < piece.size; i++) {
        ties += piece.scores[i] == all->score;
        lower += piece.scores[i] < all->score;
    }
    *piece.ties = ties, *piece.lower = lower;
}

// `ties` says here how many of them are pruned.
static void mark_piece(void *task, int64_t chunk) {
    const Layers *all = task;
    Sweep *s = layer_of(all, &chunk);
    Piece piece = piece_of(s, chunk);
    int64_t ties = *piece.ties;
    for (int64_t i = 0; i < piece.size; i++) {
        int stays = piece.scores[i] > all->score;
        if (piece.scores[i] == all->score) stays = --ties < 0;
        s->keep[piece.at[i]] = (uint8_t)stays;
    }
}

// Prune `budget` of the weights that live; write for each layer the weights that stay to `keep`, and the number of
// those that are pruned to `pruned`. The buffers of the layers lie one after the other, and `first` has one more
// entry than there are layers. MISSED: the bracket has not the cut in it.
int64_t cut(Sweep *layers, int64_t n, const int64_t *living, int64_t budget, int64_t step, float *scores, int64_t room,
            int64_t *first, int64_t *pruned, int64_t threads, const Team *team) {
    if (n < 1 || budget < 1 || step < 1 || room < 1 || threads < 1) return BAD_SIZE;
    Layers all = {layers, first, n, 0};
    int64_t total = 0, below = 0, inside = 0;
    first[0] = 0;
    for (int64_t layer = 0; layer < n; layer++) {
        if (refused(&layers[layer])) return refused(&layers[layer]);
        first[layer + 1] = first[layer] + chunks_of(layers[layer].length);
        total += living[layer];
    }
    if (budget > total) return BAD_SIZE;
    bracket(&all, scores, sample(&all, step, scores, room), (double)budget / (double)total);
    run(sweep_layers, &all, first[n], threads, team);
    float *ranks = layers[0].inside;  // those of all layers, one after the other
    for (Sweep *s = layers; s < layers + n; s++) {
        int64_t layer = s - layers, kept = 0;
        s->found = gather(s, first[layer + 1] - first[layer], &kept);
        if (s->found < 0) return s->found;
        memmove(ranks + inside, s->inside, s->found * sizeof(*ranks));
        s->inside = ranks + inside;
        inside += s->found;
        below += s->below = living[layer] - kept - s->found;
    }
    if (budget <= below || budget > below + inside) return MISSED;
    all.score = ranked(ranks, inside, budget - below - 1);
    run(count_piece, &all, first[n], threads, team);
    int64_t ties = budget - below;
    for (Sweep *s = layers; s < layers + n; s++)
        for (int64_t piece = 0; piece < first[s - layers + 1] - first[s - layers]; piece++)
            ties -= s->counts[2 * piece + 1];
    for (Sweep *s = layers; s < layers + n; s++) {
        int64_t *goes = pruned + (s - layers);
        *goes = s->below;
        for (int64_t piece = 0; piece < first[s - layers + 1] - first[s - layers]; piece++) {
            int64_t *here = s->counts + 2 * piece;
            if (here[0] > ties) here[0] = ties;
            ties -= here[0];
            *goes += here[0] + here[1];
        }
    }
    run(mark_piece, &all, first[n], threads, team);
    return 0;
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
