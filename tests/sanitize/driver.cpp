// Runs the CPU kernels over awkward shapes at every instruction set, type and thread count, against plain double loops.
// Built with AddressSanitizer and UndefinedBehaviorSanitizer by `make sanitize`; torch is not needed.
#include "common.h"

int main() {
  std::mt19937 random(1);
  check_all_scores(random);
  check_all_optimizers(random);
  check_all_joins(random);
  check_all_convs(random);
  check_all_norms(random);
  check_all_excites(random);
  if (failures == 0) std::printf("all instruction sets up to %s: right\n", isa_name(current_isa()));
  return failures != 0;
}
