// Whole passes: the parts of the library one after the other, over one allocation of scratch.
#include <algorithm>

#include "api.h"
#include "elementwise.h"
#include "passes.h"

namespace flash_dmattn {
namespace {

// Hands out places in one allocation, in bytes from its start.
struct Places {
    int64_t total = 0;

    static int64_t round_up(int64_t bytes) { return (bytes + 255) / 256 * 256; }

    int64_t take(int64_t bytes) {
        const int64_t place = total;
        total += round_up(bytes);
        return place;
    }
};

// What a kernel reads about its keys, in scratch.
struct KeyPlaces {
    int64_t entries = 0, biases = 0, sections = 0, stretches = 0, rows = 0;

    KeyPlaces() = default;

    KeyPlaces(const flash_dmattn_lists_params& p, bool is_listed, bool has_bias, Places& places) {
        const int64_t heads = int64_t(p.batch) * p.num_heads, lists = heads * p.num_epochs;
        if (is_listed) {
            entries = places.take(lists * p.capacity * sizeof(int32_t));
            sections = places.take(lists * 3 * sizeof(int32_t));
            stretches = places.take(lists * p.tiles_per_epoch * 2 * sizeof(int32_t));
        }
        if (has_bias) biases = places.take((is_listed ? lists * p.capacity : heads * p.seqlen_k) * sizeof(float));
        rows = places.take(int64_t(p.batch) * sizeof(int32_t));
    }
};

int64_t count_importances(const flash_dmattn_lists_params& p) { return int64_t(p.batch) * p.num_heads * p.seqlen_k; }

// Sets workspace_bytes of the lists.
void size_workspace(flash_dmattn_lists_params& lists, bool is_listed, bool is_ordered) {
    static const int32_t some_start = 0;  // whether there is one matters, where it is does not
    lists.query_start = is_ordered ? &some_start : nullptr;
    lists.workspace_bytes = is_listed ? flash_dmattn_lists_workspace(&lists) : 0;
    lists.query_start = nullptr;
}

// Sets the addresses of a kernel's inputs, and builds its lists, or the biases that stand for them.
template <typename Plan, typename Tensors, typename Params>
cudaError_t list_keys(
    const Plan& plan, const Tensors& tensors, const KeyPlaces& at, void* workspace, Params& params, cudaStream_t stream) {
    char* const scratch = static_cast<char*>(tensors.scratch);
    const auto ints = [scratch](int64_t place) { return reinterpret_cast<int32_t*>(scratch + place); };
    flash_dmattn_lists_params lists = plan.lists;
    cudaError_t error = cudaSuccess;
    if (plan.is_ordered && params.query_start == nullptr) {
        error = fill(ints(at.rows), lists.batch, lists.seqlen_k - lists.seqlen_q, stream);
        if (error != cudaSuccess) return error;
        params.query_start = ints(at.rows);
    }
    float* const biases = plan.has_bias ? reinterpret_cast<float*>(scratch + at.biases) : nullptr;
    params.biases = biases;
    if (!plan.is_listed) {
        if (!plan.has_bias) return cudaSuccess;
        return scale_importance(tensors.importance, biases, count_importances(lists), stream);
    }
    lists.birth = tensors.birth;
    lists.death = tensors.death;
    lists.importance = plan.has_bias ? tensors.importance : nullptr;
    lists.query_start = params.query_start;
    lists.query_positions = tensors.query_positions;
    lists.entries = ints(at.entries);
    lists.biases = biases;
    lists.sections = ints(at.sections);
    lists.stretches = ints(at.stretches);
    lists.workspace = workspace;
    params.entries = lists.entries;
    params.sections = lists.sections;
    params.stretches = lists.stretches;
    return cudaError_t(flash_dmattn_lists(&lists, stream));
}

template <typename Tensors, typename Params>
void set_inputs(const Tensors& tensors, Params& params) {
    params.query = tensors.query;
    params.key = tensors.key;
    params.value = tensors.value;
    params.birth = tensors.birth;
    params.death = tensors.death;
    params.query_start = tensors.query_start;
    params.query_positions = tensors.query_positions;
    params.stats = tensors.stats;
}

// The workspaces of the selection and of the lists lie where later stats are, or the start of scratch if they are larger.
// That of the selection, which is over before anything is listed, lies under all of scratch.
struct ForwardPlaces {
    Places places;
    KeyPlaces keys;
    int64_t stats_bytes;

    explicit ForwardPlaces(const flash_dmattn_forward_plan& plan) {
        const auto& p = plan.forward;
        stats_bytes = int64_t(p.batch) * p.num_interval_heads * p.group_size * p.seqlen_q * 2 * sizeof(float);
        places.take(in_scratch(plan.lists.workspace_bytes));
        keys = KeyPlaces(plan.lists, plan.is_listed, plan.has_bias, places);
        places.total = std::max(places.total, Places::round_up(in_scratch(plan.select.workspace_bytes)));
    }

    int64_t in_scratch(int64_t bytes) const { return bytes <= stats_bytes ? 0 : bytes; }

    void* workspace(const flash_dmattn_forward_tensors& tensors, int64_t bytes) const {
        return in_scratch(bytes) == 0 ? tensors.stats : tensors.scratch;
    }
};

cudaError_t run_forward(
    const flash_dmattn_forward_plan& plan, const flash_dmattn_forward_tensors& tensors, cudaStream_t stream) {
    const ForwardPlaces at(plan);
    if (plan.selects) {
        flash_dmattn_select_params select = plan.select;
        select.importance = tensors.importance;
        select.birth = tensors.birth;
        select.death = tensors.death;
        select.workspace = at.workspace(tensors, select.workspace_bytes);
        const int error = flash_dmattn_select(&select, stream);
        if (error != cudaSuccess) return cudaError_t(error);
    }
    flash_dmattn_forward_params params = plan.forward;
    set_inputs(tensors, params);
    params.out = tensors.out;
    params.lse = tensors.lse;
    if (plan.is_listed || !params.is_for_sm90a) {
        void* const workspace = at.workspace(tensors, plan.lists.workspace_bytes);
        const cudaError_t error = list_keys(plan, tensors, at.keys, workspace, params, stream);
        if (error != cudaSuccess) return error;
    } else if (plan.has_bias) {
        params.biases = tensors.importance;
    }
    return cudaError_t(flash_dmattn_forward(&params, stream));
}

// What has to be zero stands first, where the workspace of the lists was before.
template <typename Params>
struct BackwardPlaces {
    Places places;
    int64_t dimportance_sums, dkey_sums, dvalue_sums, dlse, zero_bytes;
    int64_t dquery_sums, counters = 0, row_facts = 0, deltas = 0;
    KeyPlaces keys;

    BackwardPlaces(const flash_dmattn_backward_plan& plan, const Params& p) {
        const int64_t rows = int64_t(p.batch) * p.seqlen_q * p.num_interval_heads * p.group_size;
        const int64_t num_kv_heads = p.num_interval_heads / p.interval_heads_per_kv_head;
        const int64_t key_size = int64_t(p.batch) * p.seqlen_k * num_kv_heads * p.head_dim;
        dimportance_sums = places.take(plan.has_bias ? count_importances(plan.lists) * sizeof(float) : 0);
        dkey_sums = places.take(key_size * sizeof(float));
        dvalue_sums = places.take(key_size * sizeof(float));
        dlse = places.take(rows * sizeof(float));
        take_own(p, rows, plan.lists.workspace_bytes);
        keys = KeyPlaces(plan.lists, plan.is_listed, plan.has_bias, places);
    }

    void take_own(const flash_dmattn_sm90_backward_params& p, int64_t rows, int64_t workspace_bytes) {
        const int64_t lists = int64_t(p.batch) * p.num_interval_heads * p.num_epochs;
        const int64_t tile_size = int64_t(flash_dmattn_sm90_backward_tile_rows(p.head_dim)) * p.head_dim;
        dquery_sums = places.take(p.num_slots * p.tiles_per_epoch * tile_size * sizeof(float));
        const int64_t numbers_of_list = p.deterministic ? 1 + 2 * int64_t(p.tiles_per_epoch) : 1;
        counters = places.take((1 + lists * numbers_of_list) * sizeof(int32_t));
        end_zeros(workspace_bytes);
        row_facts = places.take(rows * 4 * sizeof(float));
    }

    void take_own(const flash_dmattn_sm80_backward_params& p, int64_t rows, int64_t workspace_bytes) {
        end_zeros(workspace_bytes);
        const int64_t heads = int64_t(p.batch) * p.num_interval_heads;
        const int tile_rows = flash_dmattn_sm80_backward_tile_rows(p.head_dim, p.is_bfloat16, p.shared_bytes);
        const int64_t tile_size = int64_t(tile_rows) * p.head_dim;
        dquery_sums = places.take(heads * p.epochs_at_once * p.tiles_per_epoch * tile_size * sizeof(float));
        deltas = places.take(rows * sizeof(float));
    }

    void end_zeros(int64_t workspace_bytes) {
        zero_bytes = places.total;
        places.total = std::max(places.total, Places::round_up(workspace_bytes));
    }
};

template <typename Params>
int64_t backward_scratch(const flash_dmattn_backward_plan& plan, const Params& p) {
    return BackwardPlaces<Params>(plan, p).places.total;
}

using Sm90Params = flash_dmattn_sm90_backward_params;
using Sm80Params = flash_dmattn_sm80_backward_params;

void set_own(const BackwardPlaces<Sm90Params>& at, char* scratch, Sm90Params& p) {
    p.counters = reinterpret_cast<int32_t*>(scratch + at.counters);
    p.row_facts = reinterpret_cast<float*>(scratch + at.row_facts);
}

void set_own(const BackwardPlaces<Sm80Params>& at, char* scratch, Sm80Params& p) {
    p.deltas = reinterpret_cast<float*>(scratch + at.deltas);
}

template <typename Params>
cudaError_t run_backward(
    const flash_dmattn_backward_plan& plan,
    Params params,
    int (*launch)(const Params*, void*),
    const flash_dmattn_backward_tensors& tensors,
    cudaStream_t stream) {
    const BackwardPlaces<Params> at(plan, params);
    char* const scratch = static_cast<char*>(tensors.scratch);
    const auto floats = [scratch](int64_t place) { return reinterpret_cast<float*>(scratch + place); };
    set_inputs(tensors, params);
    cudaError_t error = list_keys(plan, tensors, at.keys, scratch, params, stream);
    if (error == cudaSuccess) error = cudaMemsetAsync(scratch, 0, at.zero_bytes, stream);
    if (error != cudaSuccess) return error;
    params.out = tensors.out;
    params.dout = tensors.dout;
    params.dlse = tensors.dlse != nullptr ? tensors.dlse : floats(at.dlse);
    params.dquery = tensors.dquery;
    params.dkey = tensors.dkey;
    params.dvalue = tensors.dvalue;
    params.dimportance = plan.has_bias ? floats(at.dimportance_sums) : nullptr;
    params.dkey_sums = floats(at.dkey_sums);
    params.dvalue_sums = floats(at.dvalue_sums);
    params.dquery_sums = floats(at.dquery_sums);
    set_own(at, scratch, params);
    error = cudaError_t(launch(&params, stream));
    if (error != cudaSuccess || !plan.has_bias) return error;
    const int64_t count = count_importances(plan.lists);
    return finish_dimportance(params.dimportance, tensors.importance, tensors.dimportance, count, stream);
}

}  // namespace
}  // namespace flash_dmattn

using namespace flash_dmattn;

extern "C" int64_t flash_dmattn_forward_scratch(flash_dmattn_forward_plan* plan) {
    plan->select.workspace_bytes = plan->selects ? flash_dmattn_select_workspace(&plan->select) : 0;
    size_workspace(plan->lists, plan->is_listed, plan->is_ordered);
    return ForwardPlaces(*plan).places.total;
}

extern "C" int flash_dmattn_forward_pass(
    const flash_dmattn_forward_plan* plan, const flash_dmattn_forward_tensors* tensors, void* stream) {
    return run_forward(*plan, *tensors, static_cast<cudaStream_t>(stream));
}

extern "C" int64_t flash_dmattn_backward_scratch(flash_dmattn_backward_plan* plan) {
    size_workspace(plan->lists, plan->is_listed, plan->is_ordered);
    return plan->is_for_sm90a ? backward_scratch(*plan, plan->sm90) : backward_scratch(*plan, plan->sm80);
}

extern "C" int flash_dmattn_backward_pass(
    const flash_dmattn_backward_plan* plan, const flash_dmattn_backward_tensors* tensors, void* stream) {
    const auto cuda_stream = static_cast<cudaStream_t>(stream);
    return plan->is_for_sm90a
               ? run_backward(*plan, plan->sm90, flash_dmattn_sm90_backward, *tensors, cuda_stream)
               : run_backward(*plan, plan->sm80, flash_dmattn_sm80_backward, *tensors, cuda_stream);
}
