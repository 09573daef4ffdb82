/* What the kernels share: the vector type, blocking that fits the registers, scratch memory of each thread. */
#ifndef METAHPO_COMMON_H
#define METAHPO_COMMON_H
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#ifndef REAL
#define REAL float
#endif
#if defined(__AVX512F__)
enum { BYTES = 64, ROWS = 7, COLS = 4 }; /* 32 registers: 28 sums, 4 weights, values broadcast from memory. */
#elif defined(__AVX2__)
enum { BYTES = 32, ROWS = 6, COLS = 2 }; /* 16 registers. */
#else
enum { BYTES = 16, ROWS = 7, COLS = 3 };
#endif
enum { LANES = BYTES / sizeof(REAL) };
enum { TERMS = 640 }; /* Summed one after the other; more are summed in pieces, for the sake of rounding. */
typedef REAL vec __attribute__((vector_size(BYTES)));
typedef REAL uvec __attribute__((vector_size(BYTES), aligned(sizeof(REAL)), may_alias));
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")

INLINE vec load(const REAL *from) { return *(const uvec *)from; }
INLINE void store(REAL *to, vec value) { *(uvec *)to = value; }
INLINE long round_up(long n) { return (n + LANES - 1) / LANES * LANES; }

/* Memory that a thread keeps from call to call, and frees when it ends. */
typedef char *Scratch;
static __thread char *held;
static __thread size_t held_bytes;
static pthread_key_t at_end;
__attribute__((constructor)) static void make_key(void) { pthread_key_create(&at_end, free); }

static Scratch scratch(size_t bytes)
{
    bytes += 16 * 64; /* Each piece taken is rounded up to 64 bytes; no call takes more than 16. */
    if (bytes > held_bytes) {
        free(held);
        held_bytes = (bytes + 4095) / 4096 * 4096;
        held = aligned_alloc(64, held_bytes);
        if (!held) held_bytes = 0;
        pthread_setspecific(at_end, held);
    }
    return held;
}

static void *take(Scratch *room, size_t bytes)
{
    void *piece = *room;
    *room += (bytes + 63) / 64 * 64;
    return piece;
}

/* to[c, r] = from[r, c], rows of `to` being ld long; by tiles that stay in the first-level cache. */
static void transpose(REAL *to, const REAL *from, int cols, int rows, long ld)
{
    /* from is [cols of to, rows of to] */
    for (int r0 = 0; r0 < rows; r0 += 16)
        for (int c0 = 0; c0 < cols; c0 += 16)
            for (int c = c0; c < (c0 + 16 < cols ? c0 + 16 : cols); c++)
                for (int r = r0; r < (r0 + 16 < rows ? r0 + 16 : rows); r++) to[r * ld + c] = from[(long)c * rows + r];
}

/* Weights [taps, C, O], or the transposed [taps, O, C] with the taps reversed, to [taps, C, ld]. */
static void repack_weights(REAL *to, const REAL *w, int taps, int C, int O, long ld, int transposed)
{
    for (int t = 0; t < taps; t++, to += C * ld)
        if (transposed) transpose(to, w + (long)(taps - 1 - t) * C * O, O, C, ld);
        else for (int c = 0; c < C; c++) memcpy(to + c * ld, w + ((long)t * C + c) * O, O * sizeof(REAL));
}

/* Images [n, H, W, C] to [n, PH, PW, C] with `edge` zero pixels above and to the left, and the rest zeros. */
static void pad(REAL *to, const REAL *x, long images, int H, int W, int C, int edge, int PH, int PW)
{
    size_t before = (size_t)edge * C, row = (size_t)W * C, line = (size_t)PW * C;
    for (long i = 0; i < images; i++)
        for (int h = -edge; h < PH - edge; h++, to += line) {
            if (h < 0 || h >= H) { memset(to, 0, line * sizeof(REAL)); continue; }
            memset(to, 0, before * sizeof(REAL));
            memcpy(to + before, x, row * sizeof(REAL));
            memset(to + before + row, 0, (line - before - row) * sizeof(REAL));
            x += row;
        }
}

/* Sums over pixels [P, C] of each channel, in double precision beyond a run of 32. */
static void channel_sums(const REAL *x, REAL *sum, long P, int C)
{
    for (int c0 = 0; c0 < C; c0 += 64) {
        int m = C - c0 < 64 ? C - c0 : 64;
        double total[64] = {0};
        for (long p = 0; p < P; p += 32) {
            REAL part[64] = {0};
            for (long q = p; q < (p + 32 < P ? p + 32 : P); q++)
                for (int c = 0; c < m; c++) part[c] += x[q * C + c0 + c];
            for (int c = 0; c < m; c++) total[c] += part[c];
        }
        for (int c = 0; c < m; c++) sum[c0 + c] = (REAL)total[c];
    }
}
#endif
