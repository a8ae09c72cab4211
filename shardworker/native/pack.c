#include "pack.h"

#include <string.h>

static uint32_t nibble_of(const uint8_t *row, int64_t input) {
    const uint8_t byte = row[input / GROUP * (GROUP / 2) + input % (GROUP / 2)];
    return input % GROUP < GROUP / 2 ? byte & 15 : byte >> 4;
}

static void pack_row(enum kind kind, uint8_t *panel, int64_t lane, const uint8_t *row, int64_t inputs) {
    const int64_t whole = num_groups(inputs) * GROUP;
    switch (kind) {
    case KIND_F32:
        for (int64_t k = 0; k < whole; k++) {
            float *to = (float *)panel + k * PANEL + lane;
            if (k < inputs) memcpy(to, row + k * 4, 4);
            else *to = 0;
        }
        return;
    case KIND_F16:
    case KIND_BF16:
        for (int64_t k = 0; k < whole; k++) {
            const int64_t at = kind == KIND_F16 ? k * PANEL + lane : k / 2 * 2 * PANEL + 2 * lane + k % 2;
            uint16_t *to = (uint16_t *)panel + at;
            if (k < inputs) memcpy(to, row + k * 2, 2);
            else *to = 0;
        }
        return;
    case KIND_INT8:
        for (int64_t k = 0; k < whole; k++) panel[k * PANEL + lane] = row[k];
        return;
    default:
        for (int64_t k = 0; k < whole; k += 8) {
            uint32_t word = 0;
            for (int i = 0; i < 8; i++) word |= nibble_of(row, k + i) << (i / 2 * 4 + i % 2 * 16);
            ((uint32_t *)panel)[k / 8 * PANEL + lane] = word;
        }
    }
}

void pack_rows(const struct packing *job) {
    const int64_t groups = num_groups(job->inputs), panels = num_panels(job->outputs);
    const int64_t panel_bytes = groups * group_bytes(job->kind);
    for (int64_t i = 0; i < job->rows; i++) {
        const int64_t row = job->first_row + i, expert = row / job->outputs, output = row % job->outputs;
        const int64_t panel = expert * panels + output / PANEL, lane = output % PANEL;
        pack_row(job->kind, job->values + panel * panel_bytes, lane, job->from_values + i * job->from_stride, job->inputs);
        if (is_scaled(job->kind))
            for (int64_t g = 0; g < groups; g++)
                job->scales[(panel * groups + g) * PANEL + lane] = job->from_scales[i * groups + g];
    }
}
