#include "cpu/score/score.h"

#include "common.h"

static double expected_score(const Numbers& w, const Numbers& gradients, const Shape& shape, const Criterion& c,
                             int64_t j) {
  const int64_t n = shape.filters, k = shape.size;
  const auto norm = [&](int64_t i, double p) {
    double sum = 0;
    for (int64_t x = 0; x < k; ++x) sum += std::pow(std::fabs(w[i * k + x]), p);
    return std::pow(sum, 1 / p);
  };
  if (c.kind == Kind::norm) return norm(j, c.exponent);
  if (c.kind == Kind::taylor) {
    double sum = 0;
    for (int64_t x = 0; x < k; ++x) sum += w[j * k + x] * gradients[j * k + x];
    return sum * sum;
  }
  double score = 0;
  const double length = norm(j, 2);
  for (int64_t i = 0; i < n; ++i) {
    if (c.kind == Kind::distance) {
      double sum = 0;
      for (int64_t x = 0; x < k; ++x) sum += std::pow(std::fabs(w[j * k + x] - w[i * k + x]), c.exponent);
      score += std::pow(sum, 1 / c.exponent);
      continue;
    }
    const double other = norm(i, 2);
    double less = 0, more = 0;
    for (int64_t x = 0; x < k && length > 0 && other > 0; ++x) {
      const double a = w[j * k + x] / length, b = w[i * k + x] / other;
      less += (a - b) * (a - b) / 2, more += (a + b) * (a + b) / 2;
    }
    if (length == 0 || other == 0) less = more = length == other ? 0 : 1;
    if (c.kind == Kind::cosine_distance) score += less;
    if (c.kind == Kind::weighted_hybrid && i != j) score += length * other * std::min(less, more);
  }
  return score;
}

static void check_scores(const std::vector<Shape>& shapes, DType dtype, std::mt19937& random) {
  std::vector<Numbers> weights, gradients;
  std::vector<Layer> layers, gradient_layers;
  int64_t total = 0;
  for (const Shape& shape : shapes) {
    weights.emplace_back(dtype, shape.filters * shape.size, random);
    gradients.emplace_back(total % 2 ? dtype : DType::float32, shape.filters * shape.size, random);
    if (shape.filters > 4 && shape.size > 0) {  // two all-zero filters, and a duplicate
      const int64_t bytes = weights.back().bytes.size() / shape.filters;
      weights.back().zero(0, shape.size);
      weights.back().zero(3 * shape.size, 4 * shape.size);
      std::memcpy(&weights.back().bytes[bytes], &weights.back().bytes[2 * bytes], bytes);
    }
    total += shape.filters;
  }
  for (size_t l = 0; l < shapes.size(); ++l) {
    layers.push_back({weights[l].bytes.data(), dtype, shapes[l].filters, shapes[l].size});
    gradient_layers.push_back({gradients[l].bytes.data(), gradients[l].dtype, shapes[l].filters, shapes[l].size});
  }
  const std::vector<Criterion> criteria = {
      {Kind::norm, 1},     {Kind::norm, 2},     {Kind::norm, 2.5},          {Kind::distance, 1},
      {Kind::distance, 2}, {Kind::distance, 3}, {Kind::cosine_distance, 2}, {Kind::weighted_hybrid, 2},
      {Kind::taylor, 2}};
  std::vector<double> expected;
  for (const Criterion& c : criteria) {
    for (size_t l = 0; l < shapes.size(); ++l) {
      for (int64_t j = 0; j < shapes[l].filters; ++j)
        expected.push_back(expected_score(weights[l], gradients[l], shapes[l], c, j));
    }
  }
  for (Isa isa : levels()) {
    std::vector<float> first;
    for (int threads : {1, 3}) {
      std::vector<float> scores(criteria.size() * total);
      compute_scores(layers, gradient_layers, criteria, scores.data(), threads, isa);
      for (size_t i = 0; i < scores.size(); ++i) {
        const bool good = std::fabs(scores[i] - expected[i]) <= 1e-5 * std::fabs(expected[i]) + 1e-12;
        expect(good, std::string("score ") + std::to_string(i) + " of " + std::to_string(shapes[0].filters) + "x" +
                         std::to_string(shapes[0].size) + " at " + isa_name(isa) + ": " + std::to_string(scores[i]) +
                         ", expected " + std::to_string(expected[i]));
      }
      expect(first.empty() || first == scores, "scores depend on the number of threads");
      first = scores;
    }
  }
}

static void check_single_criteria(std::mt19937& random) {
  const Shape shape = {70, 37};
  const Numbers weights(DType::float32, shape.filters * shape.size, random);  // and their own gradients
  const std::vector<Layer> layers = {{weights.bytes.data(), DType::float32, shape.filters, shape.size}};
  for (const Criterion& c : {Criterion{Kind::norm, 1},
                             {Kind::distance, 1},
                             {Kind::distance, 2},
                             {Kind::distance, 1.5},
                             {Kind::cosine_distance, 2},
                             {Kind::weighted_hybrid, 2},
                             {Kind::taylor, 2}}) {
    for (Isa isa : levels()) {
      std::vector<float> scores(shape.filters);
      compute_scores(layers, layers, {c}, scores.data(), 2, isa);
      for (int64_t j = 0; j < shape.filters; ++j) {
        const double expected = expected_score(weights, weights, shape, c, j);
        expect(std::fabs(scores[j] - expected) <= 1e-5 * expected, "a criterion alone");
      }
    }
  }
}

static void check_not_finite(std::mt19937& random) {
  const Shape shape = {5, 19};
  Numbers weights(DType::float32, shape.filters * shape.size, random);
  for (float bad : {INFINITY, -INFINITY, NAN}) {
    std::memcpy(&weights.bytes[2 * shape.size * 4], &bad, 4);
    for (Isa isa : levels()) {
      for (const Criterion& c : {Criterion{Kind::norm, 1},
                                 {Kind::norm, 3},
                                 {Kind::distance, 1},
                                 {Kind::distance, 2},
                                 {Kind::distance, 3},
                                 {Kind::cosine_distance, 2},
                                 {Kind::weighted_hybrid, 2},
                                 {Kind::taylor, 2}}) {
        std::vector<float> scores(shape.filters);
        const std::vector<Layer> layers = {{weights.bytes.data(), DType::float32, shape.filters, shape.size}};
        compute_scores(layers, layers, {c}, scores.data(), 1, isa);
        expect(!std::isfinite(scores[2]), "a filter that is not finite has a finite score");
      }
    }
  }
}

static void check_selection() {
  const float scores[] = {3, 1, 2, 1, 1};
  for (int64_t count = 0; count <= 5; ++count) {
    std::unique_ptr<bool[]> keep(new bool[5]);
    select_lowest(scores, 5, count, keep.get());
    const int64_t order[] = {1, 3, 4, 2, 0};
    for (int64_t i = 0; i < 5; ++i) expect(keep[order[i]] == (i >= count), "selection");
  }
  select_lowest(scores, 0, 0, nullptr);
}

void check_all_scores(std::mt19937& random) {
  // One less, the same and one more than a vector, a panel and a tile of columns, of rows, and a block of weights.
  const std::vector<int64_t> filters = {1, 2, 3, 15, 16, 17, 33, 63, 64, 65, 129};
  const std::vector<int64_t> sizes = {1, 2, 15, 16, 17, 27, 255, 256, 257};
  for (DType dtype : {DType::float32, DType::bfloat16, DType::float16}) {
    for (size_t i = 0; i < filters.size(); ++i) {
      check_scores({{filters[i], sizes[i % sizes.size()]}, {filters[(i + 3) % 6], sizes[(i + 5) % 6]}}, dtype, random);
    }
  }
  for (int64_t n : {191, 192, 193, 200}) check_scores({{n, 3}}, DType::float32, random);
  check_scores({{3, 0}, {0, 5}, {2, 2}}, DType::float32, random);
  check_single_criteria(random);
  check_not_finite(random);
  check_selection();
}
