// What products ask for ahead of its use: lines of memory, some in each step of K.
//
// Memory then does not wait for products, nor they for it. All at once would fill the core's buffers for lines that are on their
// way, and the products would wait. Changes no result.
#pragma once

#include <cstddef>

#include "vec.h"

// A piece of memory that is needed soon.
struct Piece {
  const char *at, *end;
};

// One piece of memory, from a line on: what is used SOON goes to the first cache level, else to the second, where it does not
// push others out.
template <bool SOON>
struct Ahead {
  const char *at, *end;
  int lines;  // a step

  // All `num_lines` of it within so many steps.
  static Ahead within(int steps, const void* at, int num_lines) {
    return {(const char*)at, (const char*)at + 64 * (size_t)num_lines, (num_lines + steps - 1) / steps};
  }
  INLINE_METHOD void step() {
    for (int i = 0; i < lines; i++) __builtin_prefetch(at + 64 * i, 0, SOON ? 3 : 2);
    at += 64 * lines;
    if (at >= end) lines = 0;
  }
};

// Several pieces, one after the other.
struct Pieces {
  const Piece *next, *last;
  int lines;
  Piece now = {};

  // All `num` of them within so many steps.
  static Pieces within(int steps, const Piece* pieces, int num) {
    size_t lines = 0;
    for (int i = 0; i < num; i++) lines += (pieces[i].end - pieces[i].at + 63) / 64;
    return {pieces, pieces + num, (int)((lines + steps - 1) / steps)};
  }
  INLINE_METHOD void step() {
    for (int i = 0; i < lines; i++, now.at += 64) {
      if (now.at >= now.end) {
        if (next == last) {
          lines = 0;
          return;
        }
        now = *next++;
      }
      __builtin_prefetch(now.at, 0, 3);
    }
  }
};

struct Both {
  Ahead<true>& panel;
  Pieces& pieces;
  INLINE_METHOD void step() {
    panel.step();
    pieces.step();
  }
};

struct Nothing {
  INLINE_METHOD void step() {}
};
