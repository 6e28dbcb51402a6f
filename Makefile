# glmtune: `make` builds it, `make test` checks it, `make demo` shows it, `make help` lists the rest.

CC     = cc
# Contraction lets the compiler use fused multiply-add; nothing else about floating point is relaxed.
CFLAGS = -std=gnu11 -O3 -march=native -ffp-contract=fast -Wall -Wextra -Wshadow -Wconversion
LDLIBS = -lm
# OpenMP if the compiler has it, found by trying. `make OPENMP=` builds without.
OPENMP := $(shell echo 'int main(void) { return 0; }' | $(CC) -x c -include omp.h -fopenmp - -o /dev/null 2>/dev/null && echo -fopenmp)
DEBUG  = -std=gnu11 -O1 -g -march=native -ffp-contract=fast -Wall -Wextra -Wshadow -Wconversion \
         -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer
PYTHON = python3
TEST_SOURCES = $(wildcard tests/*.c tests/*.h) glmtune.c

.PHONY: all test demo report bench debug cuda test-cuda first-run test-cuda-emulated golden tiny help clean
all: glmtune

glmtune: glmtune.c              # the program
	$(CC) $(CFLAGS) $(OPENMP) glmtune.c -o $@ $(LDLIBS)

glmtune64: glmtune.c            # the same in double: gradient checks, and the truth for the float build
	$(CC) $(CFLAGS) -DGLMTUNE_DOUBLE $(OPENMP) glmtune.c -o $@ $(LDLIBS)

glmtune-debug: glmtune.c        # the same under the address and undefined-behaviour sanitizers
	$(CC) $(DEBUG) $(OPENMP) glmtune.c -o $@ $(LDLIBS)

debug: glmtune-debug

# The same on one NVIDIA GPU: section 2 from glmtune.cu. CUDA_ARCHS takes other compute capabilities; the last one also
# goes in as PTX, which newer GPUs translate.
NVCC       = nvcc
CUDA_ARCHS = 80 90
CUDA_HOME  = /usr/local/cuda
NVCCFLAGS  = -std=c++17 -O3 $(foreach a,$(CUDA_ARCHS),-gencode arch=compute_$(a),code=sm_$(a)) \
             -gencode arch=compute_$(lastword $(CUDA_ARCHS)),code=compute_$(lastword $(CUDA_ARCHS)) \
             -Xcompiler -Wall,-Wextra -Werror all-warnings
CUDA_LIBS  = -L$(CUDA_HOME)/lib64 -Wl,-rpath,$(CUDA_HOME)/lib64 -lcublasLt -lcudart -lstdc++

cuda: glmtune-cuda

glmtune-cuda.o: glmtune.cu glmtune.c
	$(NVCC) $(NVCCFLAGS) -c glmtune.cu -o $@

glmtune-cuda: glmtune-cuda.o glmtune.c
	$(CC) $(CFLAGS) -DGLMTUNE_CUDA $(OPENMP) glmtune.c glmtune-cuda.o -o $@ $(CUDA_LIBS) $(LDLIBS)

# A test includes glmtune.c, so functions that it does not call are no reason to warn.
test-float: $(TEST_SOURCES)
	$(CC) $(CFLAGS) -Wno-unused-function $(OPENMP) tests/test.c -o $@ $(LDLIBS)

test-double: $(TEST_SOURCES)
	$(CC) $(CFLAGS) -Wno-unused-function -DGLMTUNE_DOUBLE $(OPENMP) tests/test.c -o $@ $(LDLIBS)

test-cuda-float: $(TEST_SOURCES) glmtune-cuda.o
	$(CC) $(CFLAGS) -Wno-unused-function -DGLMTUNE_CUDA $(OPENMP) tests/test.c glmtune-cuda.o -o $@ $(CUDA_LIBS) \
	    $(LDLIBS)

# On a GPU: the kernels against plain loops in double, every method against its golden numbers, then whole runs.
test-cuda: glmtune glmtune64 glmtune-cuda test-cuda-float
	@sh tests/run.sh "./test-cuda-float $(COMPUTING)" "env GLM_PRECISION=bf16 ./test-cuda-float $(COMPUTING)" \
	    "bash tests/cuda/compare.sh ./glmtune ./glmtune-cuda"

# The first minutes on a GPU: tests, speed, memory and times by kernel in one go, as tests/cuda/first_run.sh says.
first-run:
	@bash tests/cuda/first_run.sh

test-debug: $(TEST_SOURCES)
	$(CC) $(DEBUG) -Wno-unused-function $(OPENMP) tests/test.c -o $@ $(LDLIBS)

# Speed of kernels, of a training step and of decoding against this machine's own peak; options stand in tests/bench.c,
# as in `make bench BENCH="CONFIG.json --method full"`. On a GPU: make build/bench-cuda.
bench: build/bench
	./build/bench $(BENCH)

build/bench: tests/bench.c glmtune.c
	@mkdir -p build
	$(CC) $(CFLAGS) -Wno-unused-function $(OPENMP) tests/bench.c -o $@ $(LDLIBS)

build/bench-cuda: tests/bench.c glmtune.c glmtune-cuda.o
	@mkdir -p build
	$(CC) $(CFLAGS) -Wno-unused-function -DGLMTUNE_CUDA $(OPENMP) tests/bench.c glmtune-cuda.o -o $@ $(CUDA_LIBS) $(LDLIBS)

test-fuzz: tests/fuzz/fuzz.c glmtune.c      # the fuzz targets without a fuzzer: reads the seeds and past crashes once
	$(CC) $(CFLAGS) -Wno-unused-function tests/fuzz/fuzz.c -o $@ $(LDLIBS)

# Offline, no Python. With GLM_REAL=FOLDER also against the tokenizers and golden tensors of the real models.
test: glmtune glmtune64 test-float test-double test-fuzz
	@OMP_WAIT_POLICY=passive sh tests/run.sh ./test-float ./test-double \
	    "env GLM_PRECISION=bf16 ./test-float kernels golden quantised saved merge" \
	    "env GLM_PRECISION=pairs ./test-float kernels golden" "bash tests/test_cli.sh ./glmtune" \
	    "./test-fuzz tests/fuzz/seeds tests/fuzz/crashes" "bash tests/report.sh --short"

# glmtune.cu on an emulated device, on the CPU (tests/cuda): index by index, slow, and where no GPU is to be had.
EMULATED = -std=c++17 -O2 -g -march=native -ffp-contract=fast -Wall -Wextra -Wno-unused-function \
           -Wno-unknown-pragmas -Itests/cuda \
           -fsanitize=bounds,alignment -fno-sanitize-recover=all
EMULATOR = $(wildcard tests/cuda/*.h)

build/emulated.o: glmtune.cu glmtune.c $(EMULATOR)
	@mkdir -p build
	$(CXX) $(EMULATED) -x c++ -c glmtune.cu -o $@

glmtune-emulated: build/emulated.o glmtune.c
	$(CC) $(CFLAGS) -DGLMTUNE_CUDA -c glmtune.c -o build/glmtune-emulated.o
	$(CXX) $(EMULATED) build/glmtune-emulated.o build/emulated.o -o $@ $(LDLIBS)

test-emulated: build/emulated.o $(TEST_SOURCES)
	$(CC) $(CFLAGS) -Wno-unused-function -DGLMTUNE_CUDA -c tests/test.c -o build/test-emulated.o
	$(CXX) $(EMULATED) build/test-emulated.o build/emulated.o -o $@ $(LDLIBS)

test-emulator: tests/cuda/test_emulator.cpp $(EMULATOR)
	$(CXX) $(EMULATED) tests/cuda/test_emulator.cpp -o $@

# The groups of tests that compute, in two orders of blocks and threads and both precisions; then whole runs.
COMPUTING = kernels golden quantised training saved adapters merge accumulation dropout recomputing frozen methods init \
            generation answers
LONG      = generation answers
test-cuda-emulated: glmtune glmtune64 glmtune-emulated test-emulated test-emulator
	@sh tests/run.sh ./test-emulator $(foreach p,fp32 bf16,$(foreach o,forward reverse, \
	    "env GLM_PRECISION=$(p) CUDA_ORDER=$(o) ./test-emulated $(filter-out $(LONG),$(COMPUTING))")) \
	    "env CUDA_ORDER=shuffle ./test-emulated kernels $(LONG)" \
	    "env CUDA_REFUSES=1 ./test-emulated kernels" "env GLM_PRECISION=bf16 CUDA_REFUSES=2 ./test-emulated kernels" \
	    "bash tests/cuda/compare.sh ./glmtune ./glmtune-emulated"

# Tunes the bundled model on 40 samples about who it is, and shows its answers before and after.
demo: glmtune
	@sh tests/demo.sh

# Every method on four tasks, three seeds: tests/report, with curves.
report: glmtune
	@bash tests/report.sh

# The numbers that the tests compare with, from PyTorch, transformers and PEFT (tests/requirements.txt).
golden:
	$(PYTHON) tests/reference.py
	$(PYTHON) tests/reference_labels.py
	$(PYTHON) tests/reference_methods.py
	$(PYTHON) tests/reference_quantised.py

# The bundled vocabulary and model, from nothing: text, tokenizer, training (about seven minutes on two cores).
tiny: glmtune
	@sh tests/make_tiny.sh

help:
	@echo "make            glmtune"
	@echo "make glmtune64  the same source in double precision"
	@echo "make debug      glmtune-debug, with sanitizers"
	@echo "make cuda       glmtune-cuda, for one NVIDIA GPU (needs the CUDA toolkit)"
	@echo "make test-cuda  the tests of kernels and methods on that GPU"
	@echo "make first-run  what to run first on a GPU: tests, speed, memory, times by kernel, ten minutes"
	@echo "make test       all tests, offline; GLM_REAL=FOLDER adds those that need real tokenizers"
	@echo "make test-cuda-emulated  glmtune.cu on a device that tests/cuda emulates on the CPU, minutes"
	@echo "make demo       tunes the bundled tiny model, a few seconds"
	@echo "make bench      speed against this machine's own peak, a few seconds"
	@echo "make report     what every method learns and forgets, on four tasks: tests/report, about half an hour"
	@echo "make golden     makes the golden numbers again (Python, PyTorch)"
	@echo "make tiny       makes tokenizer.bin and the tiny model again, about seven minutes"
	@echo "make clean      removes what was built"

clean:
	rm -f glmtune glmtune64 glmtune-debug test-float test-double test-debug test-fuzz glmtune-emulated \
	    test-emulated test-emulator glmtune-cuda glmtune-cuda.o test-cuda-float
	rm -rf demo-output build
