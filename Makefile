# glmtune: `make` builds it, `make test` checks it, `make demo` shows it. `make help` lists the rest.
CC     = cc
# Contraction lets the compiler use fused multiply-add; nothing else about floating point is relaxed.
CFLAGS = -std=gnu11 -O3 -march=native -ffp-contract=fast -Wall -Wextra -Wshadow -Wconversion
LDLIBS = -lm
# OpenMP if the compiler has it, found by trying. `make OPENMP=` builds without.
OPENMP := $(shell printf 'int main(void){return 0;}' > .try.c && $(CC) -fopenmp .try.c -o .try 2>/dev/null && echo -fopenmp; \
            rm -f .try .try.c)
SANITIZE = -std=gnu11 -O1 -g -march=native -ffp-contract=fast -Wall -Wextra -Wshadow -Wconversion \
           -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer
TESTS  = tests/test.c tests/check.h tests/test_kernels.c
PYTHON = python3

glmtune: glmtune.c                      # the program
	$(CC) $(CFLAGS) $(OPENMP) glmtune.c -o $@ $(LDLIBS)

glmtune64: glmtune.c                    # the same in double precision: the truth for gradients
	$(CC) $(CFLAGS) -DGLMTUNE_DOUBLE $(OPENMP) glmtune.c -o $@ $(LDLIBS)

debug: glmtune.c                        # with address and undefined-behaviour sanitizers, as glmtune-debug
	$(CC) $(SANITIZE) $(OPENMP) glmtune.c -o glmtune-debug $(LDLIBS)

