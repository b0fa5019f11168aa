// What Python calls, and the layout of the structs that both sides declare. Nothing here is thread-safe: one engine's
// thread calls. No exception leaves: where memory ends, a call says 0.

#include <cstddef>
#include <new>

#include "growth.h"

using namespace drafts;

static int32_t num_sequences = 0;  // alive

namespace {

struct Place {
  const char* type;
  const char* field;
  int32_t offset, size;
};

template <class Body>
int32_t unless_full(const Body& body) {
  try {
    body();
    return 1;
  } catch (const std::bad_alloc&) {
    return 0;
  }
}

}  // namespace

#define STRUCT(type) {#type, nullptr, 0, sizeof(type)}
#define FIELD(type, field) {#type, #field, offsetof(type, field), sizeof(((type*)nullptr)->field)}
static const Place LAYOUT[] = {
    STRUCT(History), FIELD(History, reversed), FIELD(History, sorted), FIELD(History, rank), FIELD(History, text),
    FIELD(History, ids), FIELD(History, bounds), FIELD(History, starts), FIELD(History, text_len), FIELD(History, num_ids),
    FIELD(History, num_starts), FIELD(History, token_bytes),
    STRUCT(SourceSpec), FIELD(SourceSpec, prior), FIELD(SourceSpec, shared), FIELD(SourceSpec, data),
    FIELD(SourceSpec, data_len), FIELD(SourceSpec, prompt_len), FIELD(SourceSpec, kind), FIELD(SourceSpec, num_levels),
    FIELD(SourceSpec, own), FIELD(SourceSpec, is_head), FIELD(SourceSpec, is_stepped), FIELD(SourceSpec, name),
    STRUCT(Chains), FIELD(Chains, tokens), FIELD(Chains, probabilities), FIELD(Chains, lens), FIELD(Chains, wanted),
    FIELD(Chains, width),
    STRUCT(Growth), FIELD(Growth, sequences), FIELD(Growth, num_new), FIELD(Growth, new_tokens), FIELD(Growth, limits),
    FIELD(Growth, is_fixed), FIELD(Growth, node_rows), FIELD(Growth, node_seconds), FIELD(Growth, chains),
    FIELD(Growth, ask), FIELD(Growth, constrain), FIELD(Growth, step_heads), FIELD(Growth, clock),
    FIELD(Growth, num_admitted), FIELD(Growth, tokens), FIELD(Growth, chosen), FIELD(Growth, chances), FIELD(Growth, num_seqs),
    FIELD(Growth, num_nodes), FIELD(Growth, num_decoding), FIELD(Growth, num_rows), FIELD(Growth, max_rows),
    FIELD(Growth, drafted), FIELD(Growth, enter_gain), FIELD(Growth, draft_s), FIELD(Growth, row_price),
    FIELD(Growth, head_s), FIELD(Growth, ask_s), FIELD(Growth, num_seen), FIELD(Growth, unused), {}
};
#undef STRUCT
#undef FIELD

extern "C" {

const Place* specserve_layout() { return LAYOUT; }

int32_t specserve_num_sequences() { return num_sequences; }

void* specserve_create(const SourceSpec* specs, int32_t num, int32_t is_constrained, double* positions, int32_t is_traced) {
  Sequence* sequence = nullptr;
  unless_full([&] { sequence = new Sequence(specs, num, is_constrained, positions, is_traced); });
  num_sequences += sequence != nullptr;
  return sequence;
}

void specserve_destroy(Sequence* sequence) {
  delete sequence;
  num_sequences--;
}

int32_t specserve_grow(Growth* growth) {
  return unless_full([&] { Grower(*growth).run(); });
}

// `committed` holds num[i] tokens that came for each of the sequences, one after the other.
void specserve_learn(Sequence* const* sequences, int32_t num_seqs, const int32_t* num, const int32_t* committed) {
  for (int idx = 0; idx < num_seqs; committed += num[idx++]) sequences[idx]->learn(committed, num[idx]);
}
}
