/* What this machine's memory can do for the step: three streams read, two of them written back in place,
 *
 *     v <- 0.9 v + g;    theta <- theta - 0.01 v
 *
 * for `rows` rows (tasks) of `columns` numbers, visited tile by tile: all rows of a tile of columns, then the next
 * tile. A plain triad leaves half of this bandwidth unused: several interleaved streams keep more DRAM pages open, and
 * software prefetch keeps more lines in flight than the hardware prefetchers do, which stop at page ends.
 */
#include <stddef.h>
#include <string.h>

enum { LINE = 16 }; /* floats in a cache line */

typedef float Vector
    __attribute__((vector_size(32), aligned(4))); /* vectors by type: compilers see aliases in the plain loop */

static void run(const float* g, float* v, float* theta, ptrdiff_t n, ptrdiff_t ahead) {
  for (ptrdiff_t at = 0; at < n; at += LINE) {
    if (ahead) {
      __builtin_prefetch(g + at + ahead, 0);
      __builtin_prefetch(v + at + ahead, 1);
      __builtin_prefetch(theta + at + ahead, 1);
    }
    for (int k = 0; k < LINE; k += 8) {
      Vector *moment = (Vector*)(v + at + k), *place = (Vector*)(theta + at + k);
      Vector next = 0.9f * *moment + *(const Vector*)(g + at + k);
      *moment = next;
      *place -= 0.01f * next;
    }
  }
}

/* columns and tile: multiples of 16; stride: floats from one row to the next; ahead: prefetch distance in floats, 0 for
 * none. */
void read3_write2(const float* g, float* v, float* theta, ptrdiff_t rows, ptrdiff_t columns, ptrdiff_t stride,
                  ptrdiff_t tile, ptrdiff_t ahead, int threads) {
  ptrdiff_t tiles = (columns + tile - 1) / tile;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (ptrdiff_t i = 0; i < tiles; i++) {
    ptrdiff_t width = (i + 1) * tile < columns ? tile : columns - i * tile;
    for (ptrdiff_t r = 0; r < rows; r++) {
      ptrdiff_t at = r * stride + i * tile;
      run(g + at, v + at, theta + at, width, ahead);
    }
  }
}

/* Reads n floats and returns their sum: a buffer larger than the last-level cache leaves nothing else in it, and
 * nothing to write back. Four streams a thread, the most that reads alone get here. n: a multiple of 64. */
float walk(const float* buffer, ptrdiff_t n, int threads) {
  typedef float Line __attribute__((vector_size(64), aligned(4)));
  float total = 0;
  ptrdiff_t quarter = n / 4;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(+ : total)
  for (ptrdiff_t i = 0; i < quarter; i += LINE) {
    const float* at = buffer + i;
    Line sum = *(const Line*)at + *(const Line*)(at + quarter) + *(const Line*)(at + 2 * quarter) +
               *(const Line*)(at + 3 * quarter);
    total += sum[0] + sum[LINE - 1]; /* enough to make the reads count */
  }
  return total;
}

/* Writes zeros and reads nothing, as the C library knows best: past the caches, where n is large. */
void fill(char* buffer, ptrdiff_t n, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int part = 0; part < threads; part++) {
    ptrdiff_t begin = n / threads * part;
    memset(buffer + begin, 0, part == threads - 1 ? n - begin : n / threads);
  }
}

/* 2 * 96 * n floating-point operations in registers; returns a number that depends on all of them. */
float arithmetic(ptrdiff_t n) {
  float sum[96] = {0}, total = 0;
  for (ptrdiff_t i = 0; i < n; i++)
    for (int k = 0; k < 96; k++) sum[k] = sum[k] * 0.999f + 0.001f;
  for (int k = 0; k < 96; k++) total += sum[k];
  return total;
}
