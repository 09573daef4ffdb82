/* 3 x 3 convolution by Winograd's F(2x2, 3x3): 16 products for 4 outputs instead of 36 (Lavin and Gray 2015, section
 * 4.1, which gives the matrices B, G and A).
 *
 * Tiles of 4 x 4 inputs, 2 pixels apart, are transformed, multiplied by the transformed weights as 16 matrix products,
 * and transformed back to 2 x 2 outputs. The weights' gradient is the same read backwards. */
#ifndef METAHPO_WINOGRAD_H
#define METAHPO_WINOGRAD_H
#include "blocks.h"

enum { TILES = 4 * ROWS }; /* Worked on together: their transforms stay in the second-level cache. */

/* Small images have too many tiles that stick out; other channels would need padding. */
static int winograd_pays(int H, int W, int C, int O)
{
    return H >= 4 && W >= 4 && C % LANES == 0 && O % LANES == 0 && C >= 2 * LANES;
}

/* d -> B' d B */
INLINE void input_tile(vec d[4][4])
{
    UNROLL for (int i = 0; i < 4; i++) {
        vec a = d[0][i] - d[2][i], b = d[1][i] + d[2][i], c = d[2][i] - d[1][i], e = d[1][i] - d[3][i];
        d[0][i] = a, d[1][i] = b, d[2][i] = c, d[3][i] = e;
    }
    UNROLL for (int i = 0; i < 4; i++) {
        vec a = d[i][0] - d[i][2], b = d[i][1] + d[i][2], c = d[i][2] - d[i][1], e = d[i][1] - d[i][3];
        d[i][0] = a, d[i][1] = b, d[i][2] = c, d[i][3] = e;
    }
}

/* Tiles whose corners are at pixel[] in the padded images, to V[16, TILES, C]. */
static void input_tiles(REAL *V, const REAL *x, const int *pixel, int tiles, long line, int C)
{
    for (int t = 0; t < tiles; t++)
        for (int c = 0; c < C; c += LANES) {
            vec d[4][4];
            UNROLL for (int i = 0; i < 4; i++)
                UNROLL for (int j = 0; j < 4; j++) d[i][j] = load(x + pixel[t] + i * line + j * C + c);
            input_tile(d);
            REAL *to = V + (long)t * C + c;
            UNROLL for (int k = 0; k < 16; k++) store(to + (long)k * TILES * C, d[k / 4][k % 4]);
        }
}

/* Weights [9, C, O] to G g G', [16, C, O]. */
static void transform_weights(REAL *U, const REAL *w, long CO)
{
    const REAL half = 0.5;
    for (long at = 0; at < CO; at += LANES) {
        vec g[3][3], t[4][3];
        UNROLL for (int k = 0; k < 9; k++) g[k / 3][k % 3] = load(w + k * CO + at);
        UNROLL for (int j = 0; j < 3; j++) {
            vec outer = (g[0][j] + g[2][j]) * half, middle = g[1][j] * half;
            t[0][j] = g[0][j], t[1][j] = outer + middle, t[2][j] = outer - middle, t[3][j] = g[2][j];
        }
        UNROLL for (int i = 0; i < 4; i++) {
            vec outer = (t[i][0] + t[i][2]) * half, middle = t[i][1] * half;
            REAL *to = U + 4 * i * CO + at;
            store(to, t[i][0]);
            store(to + CO, outer + middle);
            store(to + 2 * CO, outer - middle);
            store(to + 3 * CO, t[i][2]);
        }
    }
}

/* The reverse: gradients [16, C, O] to G' u G, [9, C, O]. */
static void gather_weights(REAL *gw, const REAL *U, long CO)
{
    const REAL half = 0.5;
    for (long at = 0; at < CO; at += LANES) {
        vec t[3][4];
        UNROLL for (int j = 0; j < 4; j++) {
            vec u[4];
            UNROLL for (int i = 0; i < 4; i++) u[i] = load(U + (4 * i + j) * CO + at);
            vec sum = (u[1] + u[2]) * half;
            t[0][j] = u[0] + sum, t[1][j] = (u[1] - u[2]) * half, t[2][j] = u[3] + sum;
        }
        UNROLL for (int i = 0; i < 3; i++) {
            vec sum = (t[i][1] + t[i][2]) * half;
            REAL *to = gw + 3 * i * CO + at;
            store(to, t[i][0] + sum);
            store(to + CO, (t[i][1] - t[i][2]) * half);
            store(to + 2 * CO, t[i][3] + sum);
        }
    }
}

typedef struct { long N; int H, W, rows, cols, PH, PW; long group; } Tiling;

static Tiling tiling(long N, int H, int W, int C)
{
    Tiling t = {N, H, W, (H + 1) / 2, (W + 1) / 2, 0, 0, 0};
    t.PH = 2 * t.rows + 2, t.PW = 2 * t.cols + 2;
    long g = (256 << 10) / ((long)t.PH * t.PW * C * sizeof(REAL));
    t.group = g < 1 ? 1 : g > N ? N : g;
    return t;
}

static void tile_offsets(int *pixel, long images, Tiling t, int C)
{
    for (long i = 0; i < images; i++)
        for (int h = 0; h < t.rows; h++)
            for (int w = 0; w < t.cols; w++) *pixel++ = (int)(((i * t.PH + 2 * h) * t.PW + 2 * w) * C);
}

static void output_tile(REAL *y, const REAL *M, const REAL *bias, int h, int w, Tiling t, int O, int accumulate)
{
    for (int o = 0; o < O; o += LANES) {
        vec s[2][4];
        UNROLL for (int j = 0; j < 4; j++) {
            vec m[4];
            UNROLL for (int i = 0; i < 4; i++) m[i] = load(M + (long)(4 * i + j) * TILES * O + o);
            s[0][j] = m[0] + m[1] + m[2], s[1][j] = m[1] - m[2] - m[3];
        }
        UNROLL for (int i = 0; i < 2; i++) {
            vec left = s[i][0] + s[i][1] + s[i][2], right = s[i][1] - s[i][2] - s[i][3];
            if (h + i >= t.H) continue;
            REAL *to = y + ((long)(h + i) * t.W + w) * O + o;
            store(to, left + load(accumulate ? to : bias + o));
            if (w + 1 < t.W) store(to + O, right + load(accumulate ? to + O : bias + o));
        }
    }
}

static int winograd(const REAL *x, const REAL *w, const REAL *bias, REAL *y, long N, int H, int W, int C, int O,
                    int transposed, int accumulate)
{
    Tiling t = tiling(N, H, W, C);
    long CO = (long)C * O, per = t.rows * t.cols, padded = t.group * t.PH * t.PW * C;
    Scratch room = scratch((padded + 25 * CO + 16L * TILES * (C + O) + O) * sizeof(REAL) +
                           (t.group * per + TILES) * sizeof(int));
    if (!room) return 1;
    REAL *xp = take(&room, padded * sizeof(REAL)), *U = take(&room, 16 * CO * sizeof(REAL));
    REAL *V = take(&room, 16L * TILES * C * sizeof(REAL)), *M = take(&room, 16L * TILES * O * sizeof(REAL));
    REAL *wp = take(&room, 9 * CO * sizeof(REAL)), *zero = take(&room, O * sizeof(REAL));
    int *pixel = take(&room, t.group * per * sizeof(int)), *row = take(&room, TILES * sizeof(int)), tap = 0;
    if (transposed) {
        repack_weights(wp, w, 9, C, O, O, 1);
        w = wp;
    }
    transform_weights(U, w, CO);
    memset(zero, 0, O * sizeof(REAL));
    if (!bias) bias = zero;
    tile_offsets(pixel, t.group, t, C);
    for (int i = 0; i < TILES; i++) row[i] = i * C;
    for (long n = 0; n < N; n += t.group) {
        long images = N - n < t.group ? N - n : t.group, all = images * per;
        pad(xp, x + n * H * W * C, images, H, W, C, 1, t.PH, t.PW);
        for (long p = 0; p < all; p += TILES) {
            int tiles = all - p < TILES ? (int)(all - p) : TILES;
            input_tiles(V, xp, pixel + p, tiles, (long)t.PW * C, C);
            for (int k = 0; k < 16; k++)
                for (int o = 0; o < O; o += COLS * LANES) {
                    int NV = (O - o < COLS * LANES ? O - o : COLS * LANES) / LANES;
                    for (int c = 0; c < C; c += TERMS / 4) {
                        int now = C - c < TERMS / 4 ? C - c : TERMS / 4;
                        for (int r = 0; r < tiles; r += ROWS)
                            conv_any(tiles - r < ROWS ? tiles - r : ROWS, NV, V + (long)k * TILES * C + c, row + r,
                                     U + k * CO + (long)c * O + o, O, &tap, 1, now, c ? 0 : zero,
                                     M + ((long)k * TILES + r) * O + o, O, LANES);
                    }
                }
            for (int i = 0; i < tiles; i++) {
                long at = (p + i) % per;
                output_tile(y + (n + (p + i) / per) * H * W * O, M + (long)i * O, bias, 2 * (int)(at / t.cols),
                            2 * (int)(at % t.cols), t, O, accumulate);
            }
        }
    }
    return 0;
}

/* g's 2 x 2 tiles, zero beyond the edge, to A g A', [16, TILES, O]. */
static void gradient_tile(REAL *Z, const REAL *g, int h, int w, Tiling t, int O)
{
    for (int o = 0; o < O; o += LANES) {
        const REAL *from = g + ((long)h * t.W + w) * O + o;
        vec none = {0}, a = load(from), b = none, c = none, d = none;
        if (w + 1 < t.W) b = load(from + O);
        if (h + 1 < t.H) {
            c = load(from + (long)t.W * O);
            if (w + 1 < t.W) d = load(from + (long)(t.W + 1) * O);
        }
        vec left[4] = {a, a + c, a - c, -c}, right[4] = {b, b + d, b - d, -d};
        UNROLL for (int i = 0; i < 4; i++) {
            REAL *to = Z + 4L * i * TILES * O + o;
            store(to, left[i]);
            store(to + (long)TILES * O, left[i] + right[i]);
            store(to + 2L * TILES * O, left[i] - right[i]);
            store(to + 3L * TILES * O, -right[i]);
        }
    }
}

static int winograd_weight(const REAL *x, const REAL *g, REAL *gw, REAL *gb, long N, int H, int W, int C, int O)
{
    Tiling t = tiling(N, H, W, C);
    long CO = (long)C * O, per = t.rows * t.cols, padded = t.group * t.PH * t.PW * C;
    Scratch room = scratch((padded + 16 * CO + 16L * TILES * (C + O)) * sizeof(REAL) +
                           (t.group * per + TILES + C) * sizeof(int));
    if (!room) return 1;
    REAL *xp = take(&room, padded * sizeof(REAL)), *U = take(&room, 16 * CO * sizeof(REAL));
    REAL *V = take(&room, 16L * TILES * C * sizeof(REAL)), *Z = take(&room, 16L * TILES * O * sizeof(REAL));
    int *pixel = take(&room, t.group * per * sizeof(int)), *tile = take(&room, TILES * sizeof(int));
    int *row = take(&room, C * sizeof(int));
    tile_offsets(pixel, t.group, t, C);
    for (int i = 0; i < TILES; i++) tile[i] = i * C;
    for (int c = 0; c < C; c++) row[c] = c;
    for (long n = 0; n < N; n += t.group) {
        long images = N - n < t.group ? N - n : t.group, all = images * per;
        pad(xp, x + n * H * W * C, images, H, W, C, 1, t.PH, t.PW);
        for (long p = 0; p < all; p += TILES) {
            int tiles = all - p < TILES ? (int)(all - p) : TILES;
            input_tiles(V, xp, pixel + p, tiles, (long)t.PW * C, C);
            for (int i = 0; i < tiles; i++) {
                long at = (p + i) % per;
                gradient_tile(Z + (long)i * O, g + (n + (p + i) / per) * H * W * O, 2 * (int)(at / t.cols),
                              2 * (int)(at % t.cols), t, O);
            }
            for (int k = 0; k < 16; k++)
                for (int o = 0; o < O; o += COLS * LANES) {
                    int NV = (O - o < COLS * LANES ? O - o : COLS * LANES) / LANES;
                    for (int c = 0; c < C; c += ROWS)
                        weight_any(C - c < ROWS ? C - c : ROWS, NV, V + (long)k * TILES * C, row + c, tile, tiles,
                                   Z + (long)k * TILES * O + o, O, U + k * CO + (long)c * O + o, O, LANES,
                                   n == 0 && p == 0);
                }
        }
    }
    gather_weights(gw, U, CO);
    if (gb) channel_sums(g, gb, N * H * W, O);
    return 0;
}
#endif
