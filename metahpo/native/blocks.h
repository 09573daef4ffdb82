/* The innermost loops: a few rows by a few vectors of channels, summed in registers. */
#ifndef METAHPO_BLOCKS_H
#define METAHPO_BLOCKS_H
#include "common.h"

/* y[r, :] = bias, or the old y, + sum over taps and channels, for R pixels and NV vectors of output channels. The sum is
 * made apart and added last, so that a long one made in pieces rounds as several short ones. */
INLINE void conv_block(const int R, const int NV, const REAL *x, const int *pixel, const REAL *w, long ldw,
                       const int *tap, int taps, int C, const REAL *bias, REAL *y, long ldy, int tail)
{
    vec acc[ROWS][COLS];
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int v = 0; v < NV; v++) acc[r][v] = (vec){0};
    const REAL *px[ROWS];
    for (int t = 0; t < taps; t++) {
        UNROLL for (int r = 0; r < R; r++) px[r] = x + tap[t] + pixel[r];
        for (int c = 0; c < C; c++, w += ldw) {
            vec b[COLS];
            UNROLL for (int v = 0; v < NV; v++) b[v] = load(w + v * LANES);
            UNROLL for (int r = 0; r < R; r++) {
                REAL s = px[r][c];
                UNROLL for (int v = 0; v < NV; v++) acc[r][v] += s * b[v];
            }
        }
    }
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int v = 0; v < NV; v++) {
            REAL *to = y + r * ldy + v * LANES;
            if (v < NV - 1 || tail == LANES) {
                store(to, acc[r][v] + load(bias ? bias + v * LANES : to));
                continue;
            }
            vec a = acc[r][v];
            for (int i = 0; i < tail; i++) to[i] = a[i] + (bias ? bias[v * LANES + i] : to[i]);
        }
}

/* out[k, :] (+)= sum over n pixels of x[pixel + row[k]] * g[pixel, :], for R rows k = (tap, channel). */
INLINE void weight_block(const int R, const int NV, const REAL *x, const int *row, const int *pixel, long n,
                         const REAL *g, long ldg, REAL *out, long ldo, int tail, int first)
{
    vec acc[ROWS][COLS];
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < NV; v++) acc[r][v] = (vec){0};
    const REAL *xk[ROWS];
    UNROLL for (int r = 0; r < R; r++) xk[r] = x + row[r];
    for (long p = 0; p < n; p++, g += ldg) {
        long o = pixel[p];
        vec b[COLS];
        UNROLL for (int v = 0; v < NV; v++) b[v] = load(g + v * LANES);
        UNROLL for (int r = 0; r < R; r++) {
            REAL s = xk[r][o];
            UNROLL for (int v = 0; v < NV; v++) acc[r][v] += s * b[v];
        }
    }
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int v = 0; v < NV; v++) {
            REAL *d = out + r * ldo + v * LANES;
            vec a = acc[r][v];
            int m = v == NV - 1 ? tail : LANES;
            for (int i = 0; i < m; i++) d[i] = first ? a[i] : d[i] + a[i];
        }
}

/* One instance of a block function for every number of rows and vectors. */
#define EACH(R) \
    case R: switch (NV) { case 1: CALL(R, 1); break; case 2: CALL(R, 2); break; case 3: CALL(R, 3); break; \
                          default: CALL(R, 4); } break;
#define DISPATCH switch (R) { EACH(1) EACH(2) EACH(3) EACH(4) EACH(5) EACH(6) EACH(7) }

static void conv_any(int R, int NV, const REAL *x, const int *pixel, const REAL *w, long ldw, const int *tap, int taps,
                     int C, const REAL *bias, REAL *y, long ldy, int tail)
{
#define CALL(r, nv) conv_block(r, nv, x, pixel, w, ldw, tap, taps, C, bias, y, ldy, tail)
    DISPATCH
#undef CALL
}

static void weight_any(int R, int NV, const REAL *x, const int *row, const int *pixel, long n, const REAL *g, long ldg,
                       REAL *out, long ldo, int tail, int first)
{
#define CALL(r, nv) weight_block(r, nv, x, row, pixel, n, g, ldg, out, ldo, tail, first)
    DISPATCH
#undef CALL
}
#endif
