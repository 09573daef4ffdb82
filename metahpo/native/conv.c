/* Convolution with a K x K kernel (K odd), stride 1 and "same" zero padding, and its gradients, for small batches.
 *
 * Images are [N, H, W, C] and weights [K, K, C, O], both contiguous. Each call pads a group of images into scratch
 * memory that fits the second-level cache and works on it with a register-blocked product: ROWS pixels by up to
 * COLS vectors of channels are accumulated over all taps before anything is stored. */
#include "blocks.h"
#include "winograd.h"

typedef struct { long N; int H, W, C, K; } Images;

static long group_size(Images s)
{
    long g = (256 << 10) / ((long)(s.H + s.K - 1) * (s.W + s.K - 1) * s.C * sizeof(REAL));
    return g < 1 ? 1 : g > s.N ? s.N : g;
}

static long padded_size(Images s, long images) { return images * (s.H + s.K - 1) * (s.W + s.K - 1) * s.C; }

/* Where each pixel's window, and each tap within a window, begins in the padded images. */
static void offsets(int *pixel, int *tap, long images, Images s)
{
    int line = s.W + s.K - 1;
    for (long i = 0; i < images; i++)
        for (int h = 0; h < s.H; h++)
            for (int w = 0; w < s.W; w++) *pixel++ = (int)(((i * (s.H + s.K - 1) + h) * line + w) * s.C);
    for (int t = 0; t < s.K * s.K; t++) tap[t] = (t / s.K * line + t % s.K) * s.C;
}

/* y[N, H, W, O] (+)= conv(x[N, H, W, C], w) + bias[O]. w is [K, K, C, O], or with `transposed` [K, K, O, C], of which
 * the taps are taken in reverse: the gradient with respect to an input. */
int conv(const REAL *x, const REAL *w, const REAL *bias, REAL *y, long N, int H, int W, int C, int O, int K,
         int transposed, int accumulate)
{
    if (K == 3 && winograd_pays(H, W, C, O)) return winograd(x, w, bias, y, N, H, W, C, O, transposed, accumulate);
    Images s = {N, H, W, C, K};
    int taps = K * K, repack = transposed || O % LANES, at_once = TERMS > C ? TERMS / C : 1;
    long G = group_size(s), Op = round_up(O), pixels = G * H * W;
    Scratch room = scratch((round_up(padded_size(s, G)) + Op + (repack ? taps * C * Op : 0)) * sizeof(REAL) +
                           (pixels + taps) * sizeof(int));
    if (!room) return 1;
    REAL *xp = take(&room, round_up(padded_size(s, G)) * sizeof(REAL)), *bp = take(&room, Op * sizeof(REAL));
    if (repack) {
        REAL *wp = take(&room, taps * C * Op * sizeof(REAL));
        if (Op != O) memset(wp, 0, taps * C * Op * sizeof(REAL));
        repack_weights(wp, w, taps, C, O, Op, transposed);
        w = wp;
    }
    memset(bp, 0, Op * sizeof(REAL));
    if (bias) memcpy(bp, bias, O * sizeof(REAL));
    int *pixel = take(&room, pixels * sizeof(int)), *tap = take(&room, taps * sizeof(int));
    offsets(pixel, tap, G, s);
    for (long n = 0; n < N; n += G) {
        long images = N - n < G ? N - n : G, P = images * H * W;
        pad(xp, x + n * H * W * C, images, H, W, C, K / 2, H + K - 1, W + K - 1);
        /* Output channels outermost: their share of the weights is read from the cache by all pixels. */
        for (int o = 0; o < O; o += COLS * LANES)
            for (int t = 0; t < taps; t += at_once) {
                int left = O - o < COLS * LANES ? O - o : COLS * LANES, NV = (left + LANES - 1) / LANES;
                int now = taps - t < at_once ? taps - t : at_once;
                for (long p = 0; p < P; p += ROWS)
                    conv_any(P - p < ROWS ? (int)(P - p) : ROWS, NV, xp, pixel + p, w + (long)t * C * Op + o, Op, tap + t,
                             now, C, accumulate || t ? 0 : bp + o, y + (n * H * W + p) * O + o, O,
                             left - (NV - 1) * LANES);
            }
    }
    return 0;
}

/* gw[K, K, C, O] = the gradient with respect to the weights, gb[O] (or null) to the bias, for g[N, H, W, O]. */
int conv_weight(const REAL *x, const REAL *g, REAL *gw, REAL *gb, long N, int H, int W, int C, int O, int K)
{
    if (K == 3 && winograd_pays(H, W, C, O)) return winograd_weight(x, g, gw, gb, N, H, W, C, O);
    Images s = {N, H, W, C, K};
    int taps = K * K, repack = O % LANES;
    long G = group_size(s), Op = round_up(O), pixels = G * H * W;
    Scratch room = scratch((round_up(padded_size(s, G)) + (repack ? pixels * Op : 0)) * sizeof(REAL) +
                           (pixels + taps + (long)taps * C) * sizeof(int));
    if (!room) return 1;
    REAL *xp = take(&room, round_up(padded_size(s, G)) * sizeof(REAL));
    REAL *gp = take(&room, (repack ? pixels * Op : 0) * sizeof(REAL));
    int *pixel = take(&room, pixels * sizeof(int)), *tap = take(&room, taps * sizeof(int));
    int *row = take(&room, (long)taps * C * sizeof(int));
    offsets(pixel, tap, G, s);
    for (int k = 0; k < taps * C; k++) row[k] = tap[k / C] + k % C;
    /* Lanes beyond O must hold zeros: what memory happens to hold may be denormal numbers, a hundred times slower. */
    if (repack) memset(gp, 0, pixels * Op * sizeof(REAL));
    for (long n = 0; n < N; n += G) {
        long images = N - n < G ? N - n : G, P = images * H * W;
        const REAL *from = g + n * H * W * O;
        pad(xp, x + n * H * W * C, images, H, W, C, K / 2, H + K - 1, W + K - 1);
        if (repack) {
            for (long p = 0; p < P; p++) memcpy(gp + p * Op, from + p * O, O * sizeof(REAL));
            from = gp;
        }
        for (int o = 0; o < O; o += COLS * LANES) {
            int left = O - o < COLS * LANES ? O - o : COLS * LANES, NV = (left + LANES - 1) / LANES;
            for (int k = 0; k < taps * C; k += ROWS)
                weight_any(taps * C - k < ROWS ? taps * C - k : ROWS, NV, xp, row + k, pixel, P, from + o, Op,
                           gw + (long)k * O + o, O, left - (NV - 1) * LANES, n == 0);
        }
    }
    if (gb) channel_sums(g, gb, N * H * W, O);
    return 0;
}
