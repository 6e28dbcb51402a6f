# Tables of tests/report.sh, from the "name value" lines of its runs: METHOD.NAME.REPLAY.SEED.facts, and base.TASK.facts.
# Of several seeds a cell has the mean, and the worst in brackets.
# With -v times=1 the table of what depends on the machine.

FNR == 1 {
    n = split(FILENAME, path, "/")
    run = path[n]
    sub(/\.facts$/, "", run)
    if (split(run, part, ".") == 4) {
        group = part[1] "." part[2] "." part[3]
        runs_of[group] = runs_of[group] " " run
    }
}
{ fact[run, $1] = $2 }

function value(r, name) {
    if (!((r, name) in fact)) { print "no " name " in " r > "/dev/stderr"; failed = 1 }
    return fact[r, name]
}

# The mean over the seeds of a group METHOD.NAME.REPLAY; `worst` is the least (sign 1) or the most (-1).
function mean(group, name, sign,    list, i, n, v, sum) {
    n = split(runs_of[group], list, " ")
    if (!n) { print "no runs of " group > "/dev/stderr"; failed = 1; return 0 }
    for (i = 1; i <= n; i++) {
        v = value(list[i], name)
        sum += v
        if (i == 1 || (v - worst) * sign < 0) worst = v
    }
    return sum / n
}

function percent(group, name, sign,    m) {
    m = mean(group, name, sign)
    return sprintf("%.1f (%.1f)", 100 * m, 100 * worst)
}

# Share of the probe that is still answered right, less the base's, in points.
function kept(group,    m) {
    m = mean(group, "kept", 1)
    return sprintf("%+.1f (%+.1f)", 100 * (m - fact["base.identity", "kept"]), 100 * (worst - fact["base.identity", "kept"]))
}

function number(group, name, format) { return sprintf(format, mean(group, name, 1)) }

# The columns that every task has, behind those of its own.
function common(g) {
    return sprintf("%s | %s | %s | %.3f | %s", kept(g), percent(g, "stopped", 1),
                   percent(g, "loops", -1), mean(g, "dev_loss", -1) - mean(g, "train_loss", -1), number(g, "best_step", "%.0f"))
}

# COLUMNS: names of facts; HEADS: what the table calls them.
function table(task, columns, heads,    column, head, n, i, m, r, line, g) {
    n = split(columns, column, " ")
    split(heads, head, "/")
    line = "| method | replay | trains |"
    for (i = 1; i <= n; i++) line = line " " head[i] " |"
    print line " kept | stop | loops | gap | best step |"
    line = "|---|---|---|"
    for (i = 1; i <= n; i++) line = line "---|"
    print line "---|---|---|---|---|"
    line = "| base | | |"
    for (i = 1; i <= n; i++) line = line sprintf(" %.1f |", 100 * value("base." task, column[i]))
    printf "%s %.1f %% | %.1f | %.1f | | |\n", line, 100 * value("base." task, "kept"),
           100 * value("base." task, "stopped"), 100 * value("base." task, "loops")
    for (r = 1; r >= 0; r--)
        for (m = 1; m <= n_methods; m++) {
            g = method[m] "." task "." r
            line = sprintf("| %s | %s | %d |", method[m], r ? "yes" : "none", mean(g, "parameters", 1))
            for (i = 1; i <= n; i++) line = line " " percent(g, column[i], 1) " |"
            print line " " common(g) " |"
        }
    print ""
}

function rates(    m, i, line, run, factor, n) {
    n = split("x0_1 x0_3 identity x3 x10", factor, " ")
    print "| method | rate x 0.1 | x 0.3 | x 1 | x 3 | x 10 |\n|---|---|---|---|---|---|"
    for (m = 1; m <= n_methods; m++) {
        line = "| " method[m] " |"
        for (i = 1; i <= n; i++) {
            run = method[m] "." factor[i] ".1.1"
            line = line sprintf(" %.1f, %+.1f |", 100 * value(run, "known"), 100 * (value(run, "kept") - fact["base.identity", "kept"]))
        }
        print line
    }
    print ""
}

# Beside what the settings that were chosen for each task give, without replay.
function alone(    m, i, k, n, task, names, column, g, chosen) {
    n = split("identity ads sentiment facts", task, " ")
    names["identity"] = "known turn_8"; names["ads"] = "ad_rouge"
    names["sentiment"] = "sentiment"; names["facts"] = "country"
    print "| method | task | replay | what | alone | chosen settings | kept | chosen settings | step of the result | checkpoints left |"
    print "|---|---|---|---|---|---|---|---|---|---|"
    for (m = 1; m <= n_methods; m++)
        for (i = 1; i <= n; i++)
            for (r = 0; r <= (m == 1 && i == 1); r++) {
                g = method[m] "." task[i] "-alone." r
                chosen = method[m] "." task[i] "." r
                split(names[task[i]], column, " ")
                for (k = 1; k in column; k++)
                    printf "| %s | %s | %s | %s | %s | %s | %s | %s | %.0f | %.0f |\n", method[m], task[i], r ? "yes" : "none",
                           column[k], percent(g, column[k], 1), percent(chosen, column[k], 1), kept(g), kept(chosen),
                           mean(g, "steps", 1), mean(g, "checkpoints", -1)
                delete column
            }
    printf "\nOf ten questions about name and maker LoRA, tuned so, answers %s in the new role (mean and worst of the seeds).\n\n",
           sprintf("%.1f (%d)", mean("lora.identity-alone.0", "ten", 1), worst)
}

# LoRA on the base in 4 bits beside the same on the base as it is: with the chosen settings and replay, and alone.
function on_codes(    i, k, n, task, column, form, plain, coded) {
    n = split("known turn_8 ad_rouge sentiment country", column, " ")
    split("identity identity ads sentiment facts", task, " ")
    print "| task | what | settings | replay | base | base in 4 bits | kept: base | base in 4 bits |\n|---|---|---|---|---|---|---|---|"
    for (k = 0; k < 2; k++)
        for (i = 1; i <= n; i++) {
            form = k ? "-alone.0" : ".1"
            plain = "lora." task[i] form
            coded = "lora." task[i] "-nf4" form
            printf "| %s | %s | %s | %s | %s | %s | %s | %s |\n", task[i], column[i], k ? "none" : "chosen", k ? "none" : "yes",
                   percent(plain, column[i], 1), percent(coded, column[i], 1), kept(plain), kept(coded)
        }
    printf "\nBefore it is tuned, the base in 4 bits answers %.1f %% of the 300 old tasks; `kept` counts from the base as it is.\n\n",
           100 * value("base.nf4", "kept")
}

function swapped(    m, clean, dirty) {
    print "| method | 40 samples | 4 of them wrong | change |\n|---|---|---|---|"
    for (m = 1; m <= n_methods; m++) {
        clean = mean(method[m] ".identity.1", "known", 1)
        dirty = mean(method[m] ".swapped.1", "known", 1)
        printf "| %s | %.1f | %s | %+.1f |\n", method[m], 100 * clean, percent(method[m] ".swapped.1", "known", 1), 100 * (dirty - clean)
    }
    print ""
}

function epochs(    m, n, list, early, late) {
    print "| method | stops early: at step | validation loss | known | to the end: validation loss | known | highest loss of a step |"
    print "|---|---|---|---|---|---|---|"
    n = split("lora full ptuning", list, " ")
    for (m = 1; m <= n; m++) {
        early = list[m] ".stops-early.0.1"
        late = list[m] ".to-the-end.0.1"
        printf "| %s | %d | %.3f | %.1f | %.3f | %.1f | %.2f |\n", list[m], value(early, "steps"), value(early, "dev_loss"),
               100 * value(early, "known"), value(late, "dev_loss"), 100 * value(late, "known"), value(late, "highest_loss")
    }
    print ""
}

function machine(    m, i, list, n, g) {
    print "| method | task | replay | time of training | tokens/s | memory at most |\n|---|---|---|---|---|---|"
    n = split("identity ads sentiment facts", list, " ")
    for (m = 1; m <= n_methods; m++)
        for (i = 1; i <= n; i++) {
            g = method[m] "." list[i] ".1.1"
            printf "| %s | %s | yes | %s | %s | %s |\n", method[m], list[i], value(g, "time"), value(g, "speed"), value(g, "memory")
        }
}

END {
    n_methods = split("lora full freeze adapter ptuning", method, " ")
    if (times) { machine(); exit failed }
    print "### Identity: 40 samples\n"
    table("identity", "known later novel doubt turn_1 turn_8 turn_16 turns", "known/later/novel/doubted/turn 1/turn 8/turn 16/all three")
    print "### Advertising copy: 200 samples\n"
    table("ads", "ad_rouge ad", "ROUGE-L/to the letter")
    print "### Sentiment: 200 samples\n"
    table("sentiment", "sentiment", "right")
    print "### New facts: 100 samples\n"
    table("facts", "country", "right")
    print "### The command alone: `glmtune train DATA tests/tiny --output_dir out [--method M]`\n"
    alone()
    print "### LoRA on the base in 4 bits: `glmtune quantize tests/tiny nf4 --bits 4`\n"
    on_codes()
    print "### Four of the 40 answers are wrong\n"
    swapped()
    print "### 300 epochs\n"
    epochs()
    print "### The learning rate of identity, and others\n"
    rates()
    exit failed
}
