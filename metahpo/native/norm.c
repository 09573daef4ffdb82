/* Batch normalisation by batch statistics, (leaky) ReLU and 2 x 2 max pooling as one operation, its gradient, and the
 * gradient of that.
 *
 * Normalising and a monotone activation keep the order of a channel's values, so the largest of four is chosen first
 * (the smallest where the scale is negative) and the rest is done on a quarter of the values. With, per channel, n
 * values y, mean m, r = 1/sqrt(var + eps), z = (y - m) r at the chosen places, u = gamma z + beta, D the slope of the
 * activation at u:
 *     out = act(u)
 *     gradient, given go:  gu = D go;  A = sum gu (of beta);  B = sum gu z (of gamma);
 *         gy = gamma r (scatter(gu) - A/n - B (y - m) r / n)
 *     its gradient, given cotangents Y, G, E of gy, B, A: with Y's mean M, q = mean((y - m) r Y), F = sum gu Y (chosen)
 *         of go:    D (gamma r (Y - M - z q) + z G + E)
 *         of gamma: r (F - M A - q B)
 *         of y:     -gamma r^2/n [(F - M A - q B) x + B (Y - M - q x)] + (G - gamma r q) r (scatter(gu) - A/n - B x/n)
 *                   where x = (y - m) r
 * Tensors are [N, H, W, C] and pooled ones [N, H/2, W/2, C]; pool is 2, or 1 for none. A code byte keeps which of the
 * four was chosen (bits 0 and 1) and whether u > 0 (bit 2). */
#include "common.h"

enum { RUN = 64 }; /* Channels that are worked on together. */
#define CHANNELS _Pragma("GCC ivdep") for (int c = 0; c < m; c++)
/* Calls body(m, pool, c0, ...) for each run of m channels from c0; the usual m and pool as constants, so that sums stay
 * in registers. */
#define FOR_RUNS(body, ...) \
    for (int c0 = 0; c0 < C; c0 += RUN) { \
        int m = C - c0 < RUN ? C - c0 : RUN; \
        if (m == 64 && pool == 2) body(64, 2, c0, __VA_ARGS__); \
        else if (m == 64) body(64, 1, c0, __VA_ARGS__); \
        else if (m == 48 && pool == 2) body(48, 2, c0, __VA_ARGS__); \
        else if (m == 32 && pool == 2) body(32, 2, c0, __VA_ARGS__); \
        else body(m, pool, c0, __VA_ARGS__); \
    }

/* Adds the sums of (value - shift) and its square over pixels of one row: in working precision, then in double. */
INLINE void row_sums(const int m, const REAL *y, const REAL *shift, double *s1, double *s2, int W, int C)
{
    REAL p1[RUN] = {0}, p2[RUN] = {0};
    for (int w = 0; w < W; w++, y += C)
        CHANNELS { REAL d = y[c] - shift[c]; p1[c] += d; p2[c] += d * d; }
    CHANNELS { s1[c] += p1[c]; s2[c] += p2[c]; }
}

/* The largest of each four in two rows of W pixels (the smallest where sign is -1, the first where 0), and which. */
INLINE void choose(const int m, const REAL *y, const REAL *sign, REAL *chosen, unsigned char *code, int W, int C)
{
    for (int w = 0; w < W / 2; w++) {
        const REAL *y0 = y + 2L * w * C, *y1 = y0 + C, *y2 = y0 + (long)W * C, *y3 = y2 + C;
        REAL *to = chosen + (long)w * C;
        unsigned char *which = code + (long)w * C;
        CHANNELS {
            REAL best = y0[c];
            int k = 0;
            if (y1[c] * sign[c] > best * sign[c]) { best = y1[c]; k = 1; }
            if (y2[c] * sign[c] > best * sign[c]) { best = y2[c]; k = 2; }
            if (y3[c] * sign[c] > best * sign[c]) { best = y3[c]; k = 3; }
            to[c] = best;
            which[c] = k;
        }
    }
}

INLINE void norm_forward_run(const int m, const int pool, int c0, const REAL *y, const REAL *gamma, const REAL *beta, REAL *chosen, unsigned char *code, REAL *out, REAL *mean, REAL *rstd, long N, int H, int W, int C, double eps, double slope)
{
    long n = N * H * W, pooled = N * (H / pool) * (W / pool);
    double s1[RUN] = {0}, s2[RUN] = {0};
    REAL a[RUN], b[RUN], shift[RUN] = {0}, sign[RUN];
    CHANNELS sign[c] = gamma[c0 + c] > 0 ? 1 : gamma[c0 + c] < 0 ? -1 : 0;
    /* The first image's mean, near enough to that of all that the square taken off below is small. */
    for (int h = 0; h < H; h++) row_sums(m, y + (long)h * W * C + c0, shift, s1, s2, W, C);
    CHANNELS { shift[c] = s1[c] / (H * W); s1[c] = s2[c] = 0; }
    for (long i = 0; i < N; i++)
        for (int h = 0; h < H; h++) {
            const REAL *row = y + (i * H + h) * W * C + c0;
            long to = (i * (H / pool) + h / pool) * (W / pool) * C + c0;
            row_sums(m, row, shift, s1, s2, W, C);
            if (pool == 2 && h % 2) choose(m, row - (long)W * C, sign, chosen + to, code + to, W, C);
        }
    CHANNELS {
        double centre = s1[c] / n, var = s2[c] / n - centre * centre;
        mean[c0 + c] = shift[c] + centre;
        rstd[c0 + c] = 1 / __builtin_sqrt((var > 0 ? var : 0) + eps);
        a[c] = rstd[c0 + c] * gamma[c0 + c];
        b[c] = mean[c0 + c];
    }
    const REAL *from = (pool == 2 ? chosen : y) + c0, *shifts = beta + c0;
    for (long p = 0; p < pooled; p++) {
        REAL *o = out + p * C + c0;
        unsigned char *k = code + p * C + c0;
        const REAL *v = from + p * C;
        CHANNELS {
            REAL u = (v[c] - b[c]) * a[c] + shifts[c];
            int positive = u > 0;
            k[c] = (unsigned char)((pool == 2 ? k[c] : 0) | (positive ? 4 : 0));
            o[c] = positive ? u : u * (REAL)slope;
        }
    }
}

void norm_forward(const REAL *y, const REAL *gamma, const REAL *beta, REAL *chosen, unsigned char *code, REAL *out,
                  REAL *mean, REAL *rstd, long N, int H, int W, int C, int pool, double eps, double slope)
{
    FOR_RUNS(norm_forward_run, y, gamma, beta, chosen, code, out, mean, rstd, N, H, W, C, eps, slope)
}

/* The sums A and B over the pooled places. */
INLINE void pooled_sums(const int m, const REAL *go, const REAL *chosen, const unsigned char *code, const REAL *mean,
                        const REAL *rstd, REAL slope, double *A, double *B, long pooled, int C)
{
    for (long p0 = 0; p0 < pooled; p0 += 32) {
        REAL pa[RUN] = {0}, pb[RUN] = {0};
        for (long p = p0; p < (p0 + 32 < pooled ? p0 + 32 : pooled); p++)
            CHANNELS {
                REAL gu = code[p * C + c] & 4 ? go[p * C + c] : go[p * C + c] * slope;
                pa[c] += gu;
                pb[c] += gu * (chosen[p * C + c] - mean[c]) * rstd[c];
            }
        CHANNELS { A[c] += pa[c]; B[c] += pb[c]; }
    }
}

/* to = base + linear (y - mean) + with (or null) * y_with + scatter(weight D go) for every pixel. */
INLINE void spread(const int m, REAL *to, const REAL *y, const REAL *with, const REAL *go, const unsigned char *code,
                   const REAL *mean, const REAL *base, const REAL *linear, const REAL *other, const REAL *weight,
                   REAL slope, long N, int H, int W, int C, const int pool)
{
    int PH = H / pool, PW = W / pool;
    for (long n = 0; n < N; n++)
        for (int h = 0; h < H; h++)
            for (int w = 0; w < W; w++) {
                long at = ((n * H + h) * W + w) * C, pooled = ((n * PH + h / pool) * PW + w / pool) * C;
                const REAL *v = y + at;
                REAL *o = to + at;
                if (with) CHANNELS o[c] = base[c] + linear[c] * (v[c] - mean[c]) + other[c] * with[at + c];
                else CHANNELS o[c] = base[c] + linear[c] * (v[c] - mean[c]);
                if (h / pool >= PH || w / pool >= PW) continue; /* An odd edge that pooling leaves out. */
                const unsigned char *k = code + pooled;
                const REAL *g = go + pooled;
                int place = pool == 2 ? (h & 1) * 2 + (w & 1) : 0;
                CHANNELS {
                    REAL gu = k[c] & 4 ? g[c] : g[c] * slope;
                    o[c] += (k[c] & 3) == place ? weight[c] * gu : 0;
                }
            }
}

INLINE void norm_backward_run(const int m, const int pool, int c0, const REAL *go, const REAL *y, const REAL *gamma, const REAL *chosen, const unsigned char *code, const REAL *mean, const REAL *rstd, REAL *gy, REAL *ggamma, REAL *gbeta, long N, int H, int W, int C, double slope)
{
    double n = (double)N * H * W;
    long pooled = N * (H / pool) * (W / pool);
    double A[RUN] = {0}, B[RUN] = {0};
    REAL base[RUN], linear[RUN], weight[RUN];
    pooled_sums(m, go + c0, (pool == 2 ? chosen : y) + c0, code + c0, mean + c0, rstd + c0, slope, A, B, pooled, C);
    CHANNELS {
        double scale = (double)gamma[c0 + c] * rstd[c0 + c];
        ggamma[c0 + c] = B[c];
        gbeta[c0 + c] = A[c];
        weight[c] = scale;
        base[c] = -scale * A[c] / n;
        linear[c] = -scale * B[c] * rstd[c0 + c] / n;
    }
    spread(m, gy + c0, y + c0, 0, go + c0, code + c0, mean + c0, base, linear, 0, weight, slope, N, H, W, C, pool);
}

void norm_backward(const REAL *go, const REAL *y, const REAL *gamma, const REAL *chosen, const unsigned char *code,
                   const REAL *mean, const REAL *rstd, REAL *gy, REAL *ggamma, REAL *gbeta, long N, int H, int W, int C,
                   int pool, double slope)
{
    FOR_RUNS(norm_backward_run, go, y, gamma, chosen, code, mean, rstd, gy, ggamma, gbeta, N, H, W, C, slope)
}

/* Cotangents Y of gy, G of ggamma, E of gbeta in; of go, y and gamma out. A and B are gbeta and ggamma. */
INLINE void norm_double_run(const int m, const int pool, int c0, const REAL *Y, const REAL *G, const REAL *E, const REAL *go, const REAL *y, const REAL *gamma, const REAL *chosen, const unsigned char *code, const REAL *mean, const REAL *rstd, const REAL *A, const REAL *B, REAL *ogo, REAL *oy, REAL *ogamma, long N, int H, int W, int C, double slope)
{
    double n = (double)N * H * W;
    int PH = H / pool, PW = W / pool;
    double sum[RUN] = {0}, dot[RUN] = {0}, F[RUN] = {0};
    const REAL *centre = mean + c0;
    for (long h = 0; h < N * H; h++) {
        REAL p1[RUN] = {0}, p2[RUN] = {0};
        for (int w = 0; w < W; w++) {
            const REAL *a = Y + (h * W + w) * C + c0, *v = y + (h * W + w) * C + c0;
            CHANNELS { p1[c] += a[c]; p2[c] += a[c] * (v[c] - centre[c]); }
        }
        CHANNELS { sum[c] += p1[c]; dot[c] += p2[c]; }
    }
    REAL M[RUN], Q[RUN], scale[RUN];
    CHANNELS {
        M[c] = sum[c] / n;
        Q[c] = dot[c] * rstd[c0 + c] / n;
        scale[c] = gamma[c0 + c] * rstd[c0 + c];
    }
    for (long i = 0; i < N; i++)
        for (int h = 0; h < PH; h++) {
            REAL part[RUN] = {0};
            for (int w = 0; w < PW; w++) {
                long at = ((i * H + pool * h) * W + pool * w) * C + c0, p = ((i * PH + h) * PW + w) * C + c0;
                const REAL *Y0 = Y + at, *Y1 = Y0 + C, *Y2 = Y0 + (long)W * C, *Y3 = Y2 + C;
                const REAL *v = (pool == 2 ? chosen + p : y + at), *g = go + p, *r = rstd + c0;
                const unsigned char *k = code + p;
                if (pool == 1) Y1 = Y2 = Y3 = Y0;
                CHANNELS {
                    int place = k[c] & 3;
                    REAL low = place & 1 ? Y1[c] : Y0[c], high = place & 1 ? Y3[c] : Y2[c];
                    REAL at_chosen = place & 2 ? high : low;
                    REAL D = k[c] & 4 ? 1 : (REAL)slope, z = (v[c] - centre[c]) * r[c];
                    part[c] += D * g[c] * (at_chosen - M[c]); /* F - M A: centred, so that nothing cancels. */
                    ogo[p + c] = D * (scale[c] * (at_chosen - M[c] - z * Q[c]) + z * G[c0 + c] + E[c0 + c]);
                }
            }
            CHANNELS F[c] += part[c];
        }
    REAL base[RUN], linear[RUN], other[RUN], weight[RUN];
    CHANNELS {
        double r = rstd[c0 + c], s = scale[c], a = A[c0 + c], b = B[c0 + c], q = Q[c];
        double rest = F[c] - q * b, tilt = (G[c0 + c] - s * q) * r;
        ogamma[c0 + c] = r * rest;
        weight[c] = tilt;
        other[c] = -s * r * b / n;
        linear[c] = (-s * r * (rest - b * q) - tilt * b) * r / n;
        base[c] = s * r * b * M[c] / n - tilt * a / n;
    }
    spread(m, oy + c0, y + c0, Y + c0, go + c0, code + c0, centre, base, linear, other, weight, slope, N, H, W, C,
           pool);
}

void norm_double(const REAL *Y, const REAL *G, const REAL *E, const REAL *go, const REAL *y, const REAL *gamma,
                 const REAL *chosen, const unsigned char *code, const REAL *mean, const REAL *rstd, const REAL *A,
                 const REAL *B, REAL *ogo, REAL *oy, REAL *ogamma, long N, int H, int W, int C, int pool, double slope)
{
    FOR_RUNS(norm_double_run, Y, G, E, go, y, gamma, chosen, code, mean, rstd, A, B, ogo, oy, ogamma, N, H, W, C, slope)
}
