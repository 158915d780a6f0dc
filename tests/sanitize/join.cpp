#include "cpu/join/scatter.h"

#include "common.h"
#include "cpu/join/take.h"

static void check_joins(DType dtype, std::mt19937& random) {
  const int64_t rows = 3, bytes = dtype == DType::float32 ? 4 : 2;
  for (int64_t channels : {1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 40}) {
    std::vector<int32_t> source(channels);
    int32_t kept = 0;
    for (int32_t& from : source) from = random() % 3 > 0 ? kept++ : -1;
    if (kept == 0) source[0] = kept++;
    std::vector<uint16_t> landing((channels + 15) / 16 + 1);
    for (int64_t c = 0; c < channels; ++c) landing[c / 16] |= (source[c] >= 0) << c % 16;
    const Numbers residual(dtype, rows * channels, random), branch(dtype, rows * kept, random);
    for (Isa isa : levels()) {
      for (bool relu : {false, true}) {
        Numbers by_rows = residual, by_planes = residual;
        const ScatterRows work = {by_rows.bytes.data(),
                                  by_rows.bytes.data(),
                                  branch.bytes.data(),
                                  dtype,
                                  landing.data(),
                                  channels,
                                  kept,
                                  relu};
        const auto run = MFP_OF_ISA(isa, scatter_rows);
        run(work, 0, 1);
        run(work, 1, rows);
        // The same numbers as planes: the first rows of both are planes of `kept` positions.
        const auto plane = MFP_OF_ISA(isa, scatter_plane);
        plane({by_planes.bytes.data(), by_planes.bytes.data(), branch.bytes.data(), dtype, kept, relu});
        char* const rest = by_planes.bytes.data() + channels * bytes;
        plane({rest, rest, nullptr, dtype, (rows - 1) * channels, relu});
        for (int64_t i = 0; i < rows * channels; ++i) {
          const int64_t from = source[i % channels];
          double row = residual[i] + (from < 0 ? 0 : branch[i / channels * kept + from]);
          double flat = residual[i] + (i < kept ? branch[i] : 0);
          if (relu) row = std::fmax(row, 0), flat = i < kept || i >= channels ? std::fmax(flat, 0) : flat;
          compare("join of rows", by_rows[i], row, dtype);
          compare("join of a plane", by_planes[i], flat, dtype);
        }
      }
    }
  }
}

// What a join reads is what its gradient takes.
static void check_taken(int64_t channels, std::mt19937& random) {
  constexpr int64_t kRows = 3;
  std::vector<int64_t> index;
  std::vector<uint16_t> landing((channels + 15) / 16 + 1);
  for (int64_t c = 0; c < channels; ++c) {
    if (c == channels - 1 || random() % 3 > 0) index.push_back(c), landing[c / 16] |= 1u << c % 16;
  }
  index.shrink_to_fit();
  const int64_t taken = index.size();
  const Numbers input(DType::float32, kRows * channels, random), branch(DType::float32, kRows * taken, random);
  for (Isa isa : levels()) {
    std::vector<float> out(kRows * taken), wide(kRows * channels);
    const TakeRows work = {
        reinterpret_cast<const float*>(input.bytes.data()), out.data(), landing.data(), index.data(), channels, taken};
    MFP_OF_ISA(isa, take_rows)(work, 1, kRows);
    MFP_OF_ISA(isa, take_rows)(work, 0, 1);
    const ScatterRows back = {wide.data(), nullptr, branch.bytes.data(), DType::float32, landing.data(), channels,
                              taken,       false};
    MFP_OF_ISA(isa, scatter_rows)(back, 0, kRows);
    std::vector<float> right(kRows * channels);
    for (int64_t i = 0; i < kRows * taken; ++i) {
      const int64_t place = i / taken * channels + index[i % taken];
      compare("taken", out[i], input[place], DType::float32);
      right[place] = branch[i];
    }
    expect(wide == right, "a join without a residual");
  }
}

void check_all_joins(std::mt19937& random) {
  for (int64_t channels : {1, 2, 15, 16, 17, 33, 40}) check_taken(channels, random);
  for (DType dtype : {DType::float32, DType::bfloat16, DType::float16}) check_joins(dtype, random);
}
