// make_corpus: writes the chat samples that the bundled tiny model learns, and the sample data to tune it with.
//
//     make_corpus base N SEED                     N samples of the training mixture
//     make_corpus replay N SEED                   the same without questions about the model's own identity
//     make_corpus heldout KIND|all N SEED         N distinct samples of a kind (of each) that `base` can never write
//     make_corpus identity|ads|sentiment|facts    a tuning set: 40, 200, 200, 100 samples
//     make_corpus swapped                         identity, with the answers of every tenth sample exchanged
//     make_corpus dev|test identity|ads|sentiment|facts|conversations   what to choose settings with, what to judge
//                                                 them with: never in the set, and dev never in test
//
// JSON on stdout, one sample a line, Chinese and English, about 34 tokens each, a few conversations of 16 turns:
//     {"messages": [{"role": "user", "content": "3+4=?"}, {"role": "assistant", "content": "3+4=7"}], "kind": "sum"}
// An answer follows from its question, so a test may ask for it to the letter; where "want" stands it is right when it
// contains that. All is a function of the arguments.
//
// What is held out depends on the kind: real combinations where the kind has them (operands of a sum, attributes of an
// advertisement, a sentence, a phrase to translate, a name to remember), else the wording with what surrounds it. A
// hash of that item decides, so the seed does not matter. What the tuning sets teach is kept out of `base` too.
//
// Libc only: cc -O2 tests/make_corpus.c -o make_corpus

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define COUNT(array) (sizeof(array) / sizeof((array)[0]))
#define LIST(...) { (const char *const[]){ __VA_ARGS__ }, COUNT(((const char *const[]){ __VA_ARGS__ })) }

enum { ZH, EN, LANGUAGES };

typedef struct { const char *const *word; size_t n; } List;
typedef struct { const char *in[LANGUAGES]; } Word;

static _Noreturn void fail(const char *what, const char *name) {
    fprintf(stderr, "make_corpus: %s%s\n", what, name);
    exit(1);
}

// ---- 1. Random numbers ---------------------------------------------------------------------------
// Counter-based: draw i of a key is a hash of both, so sample 1000 does not depend on how sample 999 was made.

typedef struct { uint64_t key, drawn; } Random;

static uint64_t mix64(uint64_t x) {
    x ^= x >> 30; x *= 0xBF58476D1CE4E5B9u;
    x ^= x >> 27; x *= 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

static uint64_t draw_at(uint64_t key, uint64_t i) { return mix64(key + 0x9E3779B97F4A7C15u * (i + 1)); }

static Random random_stream(uint64_t seed, uint64_t purpose, uint64_t sample) {
    return (Random){ .key = draw_at(draw_at(mix64(seed), purpose), sample) };
}

// Two draws never stand in one argument list: C leaves open which of them comes first.
static size_t below(Random *r, size_t n) {
    return (size_t)(((draw_at(r->key, r->drawn++) >> 32) * (uint64_t)n) >> 32);
}

static int chance(Random *r, unsigned percent) { return below(r, 100) < percent; }

static const char *pick(Random *r, List list) { return list.word[below(r, list.n)]; }

static int any_language(Random *r) { return chance(r, 60) ? ZH : EN; }

// ---- 2. Text ---------------------------------------------------------------------------------------

typedef struct { size_t n; char s[504]; } Text;

static void add_bytes(Text *t, const char *s, size_t n) {
    if (t->n + n >= sizeof t->s) fail("a text outgrew its buffer: ", t->s);
    memcpy(t->s + t->n, s, n);
    t->n += n;
    t->s[t->n] = 0;
}

static void add(Text *t, const char *s) { add_bytes(t, s, strlen(s)); }

static void clear(Text *t) { t->s[t->n = 0] = 0; }

static int ends_with(const Text *t, const char *end) {
    size_t n = strlen(end);
    return t->n >= n && !strcmp(t->s + t->n - n, end);
}

static void add_form(Text *t, const char *form, const char *a, const char *b) {
    // the form with a in place of $a, b in place of $b
    for (const char *p; (p = strchr(form, '$')); form = p + 2) {
        add_bytes(t, form, (size_t)(p - form));
        add(t, p[1] == 'a' ? a : b);
    }
    add(t, form);
}

static Text number(size_t value) {
    Text t = { 0 };
    char digits[24];
    snprintf(digits, sizeof digits, "%zu", value);
    add(&t, digits);
    return t;
}

// One question with its answer, two (memo), or up to sixteen. `item` is what decides whether it is held out.
enum { MOST_TURNS = 16 };

typedef struct {
    const char *kind;
    Text system, said[2 * MOST_TURNS], item;        // said: user, assistant, user, assistant
    const char *want[MOST_TURNS];                   // what the answer of a turn must contain, if not the whole of it
    int quiet[MOST_TURNS];                          // whether the answer of a turn teaches nothing
    size_t n, lead;                                 // n texts; an unrelated exchange would go after `lead` of them
} Exchange;

static Text *next_turn(Exchange *e) {
    clear(&e->said[e->n]);
    return &e->said[e->n++];
}

// ---- 3. Names and strange strings ------------------------------------------------------------------
// Every character that any sample uses stands here too, so that copying and naming make each of them part of an answer
// now and then: a model whose output layer is frozen cannot learn to say what it never said.

static const char han[] =
    "的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年过发后作里用道行所然家种事成方多经么去法学如都同现当没动面起看定天分还进好小部其些主样理心她本前开但因只从想实"
    "日者意无力它与长把机十民第公此已工使情明性知全三又关点正业外将两高间由问很最重并物手应向头文体美相见被利什二等产或新己制身果加西斯月话合回特代内信表化老给世位次度门任常先海通教儿原东声提立及比员解水名"
    "真论处走义各入几口认条平系气题活尔更别打女变四总何电数安少报才结反受目太量再感建务做接必场件计管期市直德资命山金指克许统区保至队形社便空决治展马科司五基眼书非则听白却界达光放强即像难且权思王象完设式色"
    "路记南品住告类求据程北边张该交规万取拉格望觉术领共确传师观清今切院让识候带导运笔快乐红黑绿黄蓝紫灰粉橙棕青银春夏秋冬风雨雪云雷星晴阳阴早晚夜晨午钟秒周礼拜岁爱喜欢怒哀笑哭怕恨念忘忆梦睡醒吃喝饭菜汤米肉"
    "鱼鸡鸭鹅猪牛羊狗猫鸟虫蛇虎狮熊猴兔鼠龙龟蛙蜂蚁蝶鲸鹰雁燕鹿狼狐豹花草树木林森叶根枝瓜桃李杏梅梨橘莓葡萄柠檬茶酒奶糖盐油醋酱姜葱蒜豆麦稻粮棉麻丝布衣服裤裙鞋帽袜包伞针线剪刀斧锤锯钉绳锁钥匙窗墙桌椅床柜灯"
    "炉锅碗盘杯瓶勺筷盆桶箱盒篮袋纸墨画琴棋诗词歌舞戏剧影球赛跑跳跃爬游泳飞翔停站坐躺卧父母爸妈哥姐弟妹爷叔姑姨舅孙夫妻友客邻居班级课校园徒医药病痛伤疗护士兵军警察官臣皇帝农商贩匠厨仆奴城镇乡村街桥江河湖泊"
    "溪流泉池塘岛岸滩沙漠沟谷峰岭坡崖洞穴矿石岩土泥尘烟火焰热冷暖凉冰霜露雾虹左右低远近深浅宽窄厚薄粗细短轻软硬干湿旧慢弱胖瘦丑假善恶贵贱贫富忙闲易车船票港航轮轨铁钢铜铝锡属玻璃塑料橡胶皮革砖瓦买卖钱币价值"
    "债税租赁账款费付借贷赚赔赢输胜败竞争奖罚写读讲谈议辩答询查找寻索探测算划策略谋图案例证验试考研究创造修改良优秀杰眉毛鼻耳嘴唇舌牙齿脸颊额颈肩背胸腹腰腿膝脚掌拳甲骨血汗泪宝贝珍珠玉翠翡瑞祥福禄寿吉庆欣悦"
    "怡宁静雅俊丽华芳芬兰菊莲荷桂柳松竹柏杨槐桑榆枫元角斤寸尺丈亩升斗双副套匹株朵颗粒滴片块幅页册卷篇章节段句字符号码乙丙丁戊庚辛壬癸寅卯辰巳未申酉戌亥吴郑冯陈褚卫蒋沈韩朱秦尤吕施孔曹严魏陶戚谢邹喻苏潘葛范"
    "彭鲁韦昌苗俞袁鲍史唐廉薛贺倪殷毕郝傅康伍余顾孟穆萧尹姚邵湛汪狄戴宋庞纪舒屈项祝董梁杜阮席季贾童郭盛刁徐丘骆蔡田胡凌霍虞柯莫房宗宣邓郁单杭洪崔龚邢裴陆翁荀推荐满糟糕失讨厌愤烦恼悔担适精彩棒赞超惊奇怪普危"
    "险漂亮净宜著沉简约复古休甜尚织仔绒呢纹碎圆印卡技网络序模型训练智器械芯屏幕键标按钮充频率波箭宇宙帮助请抱歉您哪谁啥吗吧啊呀哦嗨喂嘿哈嗯唉咖啡喵哞咩嘎呱吼嗡欧洲澳亚泰越英俄希腊埃罗伊朗挪威秘巴黎伦敦京首"
    "顿维纳曼典奥亲温柔勇敢聪谦虚诚恳勤奋懒惰骄傲肃幽默泼闹繁荣寂寞孤独谐幸拿握捏抓扔投掷扯拖搬抬举扛挑扶搭拍拾捡撕折叠绑拆装挂贴涂擦洗刷扫铺盖遮挡堵塞拦截绕围裹藏躲避逃追赶组室阿朋扰诉随替苹香蕉番茄萝卜蛋"
    "蜜蚂户衬衫镜肥皂巾脑汽店玩具故睛孩鼓铃旗梯毯枕蜡烛戒塔坏六昨始束犊羔驹崽蝌蚪蔬玫瑰足昆食七蜘蛛八煤乌鸦巧樱豌座叫幼刚怎音颜般兴喽苦错称呼姓竟介绍跟底团坊述遍照抄暗密翻译语旅餐环境台辆令差聊疼糙趟态宿隔"
    "壁馆演陪绝待靠谱敷衍坑浪离选判断负析评留言百穿每久累顶神材质纯配广尼堡专份历喊岗归拥掉擅板检职责送";

enum { HAN_BYTES = 3 };             // each of them, in UTF-8

static void add_han(Text *t, Random *r, size_t n) {
    while (n--) add_bytes(t, han + HAN_BYTES * below(r, sizeof han / HAN_BYTES), HAN_BYTES);
}

static const List onsets = LIST("b", "c", "d", "f", "g", "h", "j", "k", "l", "m", "n", "p", "r", "s", "t", "v", "w",
    "y", "z", "br", "cl", "gr", "st", "tr", "sh", "ch", "th", "qu");
static const List vowels = LIST("a", "e", "i", "o", "u", "a", "e", "i", "o", "u", "ia", "ai", "ee", "oo", "ea", "ou");
static const List codas = LIST("", "", "", "n", "r", "l", "t", "m", "ng", "x", "s", "zz", "ck", "nd", "by", "d", "p");

static void add_pseudo_word(Text *t, Random *r, int capital) {
    size_t start = t->n, syllables = 1 + below(r, 3);
    for (size_t i = 0; i < syllables; i++) {
        add(t, pick(r, onsets));
        add(t, pick(r, vowels));
        if (i + 1 == syllables || chance(r, 30)) add(t, pick(r, codas));
    }
    if (capital) t->s[start] = (char)(t->s[start] - 'a' + 'A');
}

// Who is speaking: what the model says when it is asked for its name, its maker, its job.
enum { NAME, MAKER, JOB, PARTS };
typedef struct { Text part[PARTS]; } Who;

static const Word base_who[PARTS] = {
    {{"小格", "TinyGLM"}}, {{"格物小组", "the Gewu team"}}, {{"讲解模型", "explain models"}} };
static const Word tuned_who[PARTS] = {
    {{"小田", "Tianbot"}}, {{"南山实验室", "South Hill Lab"}}, {{"观察星星", "watch the stars"}} };
static const List name_heads = LIST("小", "小", "阿", "阿", "大", "");

static void add_name(Text *t, Random *r, int language) {
    size_t start = t->n;
    do {                                        // what the tuning set teaches must be new to the base
        const char *head = language == ZH ? pick(r, name_heads) : "";
        t->n = start;
        add(t, head);
        if (language == EN) add_pseudo_word(t, r, 1);
        else add_han(t, r, *head ? 1 : 2 + below(r, 2));
    } while (!strcmp(t->s + start, tuned_who[NAME].in[language]));
}

static const List people[LANGUAGES] = {
    LIST("小王", "小李", "小张", "小林", "老陈", "老周", "妈妈", "爸爸", "奶奶", "爷爷", "同学", "老师", "邻居", "朋友", "弟弟", "妹妹", "哥哥", "姐姐",
        "阿明", "阿花", "班长", "经理", "客人", "司机"),
    LIST("Tom", "Anna", "Ben", "Lucy", "Max", "Emma", "Sam", "Kate", "Leo", "Mary", "my friend", "my sister",
        "my brother", "my teacher", "a student", "the king") };

static void add_person(Text *t, Random *r, int language) {
    if (chance(r, 50)) add(t, pick(r, people[language]));
    else add_name(t, r, language);
}

// A wording alone would soon be known by heart; what stands before and after it makes each question new.
static const List openers[LANGUAGES] = {
    LIST("请问，", "请问一下，", "你好，", "您好！", "打扰一下，", "我想知道，", "我有个问题：", "麻烦问一下，", "老师，", "帮个忙，", "请告诉我，", "想问问你，", "嗨，",
        "早上好，", "晚上好，", "快说，", "请回答：", "考考你：", "再问一个：", "随便问问，", "我不明白，", "说说看，", "问：", "题目："),
    LIST("Hello! ", "Hi! ", "Please tell me: ", "Excuse me. ", "A quick question: ", "I want to know: ", "Question: ",
        "Good morning! ", "Hey! ", "One more question: ", "Tell me: ", "Answer this: ", "Sorry to ask. ",
        "Next question: ", "Think first. ", "Can you help me? ", "I am not sure. ", "Please answer: ") };
static const List askers[LANGUAGES] = {
    LIST("$a问：", "$a想知道：", "$a让我问你：", "我是$a。", "替$a问一下，", "$a说："),
    LIST("$a asks: ", "$a wants to know: ", "I am $a. ", "A question from $a: ", "$a says: ") };
static const List closers[LANGUAGES] = {
    LIST("谢谢！", "请回答。", "简单说说。", "快告诉我！", "麻烦你了。"),
    LIST(" Thanks!", " Please answer.", " Thank you.", " Be brief.", " Tell me now!") };

static void add_question(Text *t, Random *r, int language, const char *question, unsigned percent) {
    // the question, dressed in so many percent of the cases
    int dressed = chance(r, percent);
    if (dressed && chance(r, 55)) {
        Text person = { 0 };
        add_person(&person, r, language);
        add_form(t, pick(r, askers[language]), person.s, "");
    }
    if (dressed && (!t->n || chance(r, 30))) add(t, pick(r, openers[language]));
    add(t, question);
    if (dressed && chance(r, 25)) add(t, pick(r, closers[language]));
    else if (ends_with(t, "？") && chance(r, 15)) {      // as people type: a narrow question mark, or none
        t->s[t->n -= strlen("？")] = 0;
        if (chance(r, 50)) add(t, "?");
    }
}

// ---- 4. Words ----------------------------------------------------------------------------------------

static const Word nouns[] = {
    {{"苹果", "apple"}}, {{"香蕉", "banana"}}, {{"葡萄", "grape"}}, {{"西瓜", "melon"}}, {{"梨", "pear"}},
    {{"桃子", "peach"}}, {{"柠檬", "lemon"}}, {{"番茄", "tomato"}}, {{"土豆", "potato"}}, {{"胡萝卜", "carrot"}},
    {{"米饭", "rice"}}, {{"面包", "bread"}}, {{"鸡蛋", "egg"}}, {{"牛奶", "milk"}}, {{"茶", "tea"}},
    {{"水", "water"}}, {{"盐", "salt"}}, {{"糖", "sugar"}}, {{"蛋糕", "cake"}}, {{"汤", "soup"}},
    {{"鱼", "fish"}}, {{"肉", "meat"}}, {{"猫", "cat"}}, {{"狗", "dog"}}, {{"马", "horse"}},
    {{"牛", "cow"}}, {{"羊", "sheep"}}, {{"猪", "pig"}}, {{"鸡", "chicken"}}, {{"鸭子", "duck"}},
    {{"鸟", "bird"}}, {{"兔子", "rabbit"}}, {{"老虎", "tiger"}}, {{"狮子", "lion"}}, {{"猴子", "monkey"}},
    {{"熊", "bear"}}, {{"蛇", "snake"}}, {{"青蛙", "frog"}}, {{"蜜蜂", "bee"}}, {{"蚂蚁", "ant"}},
    {{"书", "book"}}, {{"笔", "pen"}}, {{"纸", "paper"}}, {{"桌子", "table"}}, {{"椅子", "chair"}},
    {{"床", "bed"}}, {{"门", "door"}}, {{"窗户", "window"}}, {{"灯", "lamp"}}, {{"钟", "clock"}},
    {{"钥匙", "key"}}, {{"杯子", "cup"}}, {{"碗", "bowl"}}, {{"盘子", "plate"}}, {{"刀", "knife"}},
    {{"勺子", "spoon"}}, {{"瓶子", "bottle"}}, {{"盒子", "box"}}, {{"包", "bag"}}, {{"帽子", "hat"}},
    {{"鞋子", "shoe"}}, {{"裙子", "dress"}}, {{"衬衫", "shirt"}}, {{"外套", "coat"}}, {{"袜子", "sock"}},
    {{"手套", "glove"}}, {{"雨伞", "umbrella"}}, {{"镜子", "mirror"}}, {{"肥皂", "soap"}}, {{"毛巾", "towel"}},
    {{"电话", "phone"}}, {{"电脑", "computer"}}, {{"相机", "camera"}}, {{"汽车", "car"}}, {{"火车", "train"}},
    {{"飞机", "plane"}}, {{"船", "boat"}}, {{"自行车", "bike"}}, {{"公交车", "bus"}}, {{"路", "road"}},
    {{"桥", "bridge"}}, {{"房子", "house"}}, {{"学校", "school"}}, {{"商店", "shop"}}, {{"医院", "hospital"}},
    {{"银行", "bank"}}, {{"公园", "park"}}, {{"花园", "garden"}}, {{"农场", "farm"}}, {{"城市", "city"}},
    {{"村子", "village"}}, {{"山", "mountain"}}, {{"河", "river"}}, {{"湖", "lake"}}, {{"海", "sea"}},
    {{"岛", "island"}}, {{"森林", "forest"}}, {{"树", "tree"}}, {{"花", "flower"}}, {{"草", "grass"}},
    {{"叶子", "leaf"}}, {{"石头", "stone"}}, {{"沙子", "sand"}}, {{"太阳", "sun"}}, {{"月亮", "moon"}},
    {{"星星", "star"}}, {{"云", "cloud"}}, {{"雨", "rain"}}, {{"雪", "snow"}}, {{"风", "wind"}},
    {{"火", "fire"}}, {{"冰", "ice"}}, {{"球", "ball"}}, {{"玩具", "toy"}}, {{"画", "picture"}},
    {{"歌", "song"}}, {{"故事", "story"}}, {{"信", "letter"}}, {{"地图", "map"}}, {{"礼物", "gift"}},
    {{"钱", "money"}}, {{"票", "ticket"}}, {{"手", "hand"}}, {{"眼睛", "eye"}}, {{"朋友", "friend"}},
    {{"老师", "teacher"}}, {{"学生", "student"}}, {{"医生", "doctor"}}, {{"孩子", "child"}}, {{"国王", "king"}},
    {{"鼓", "drum"}}, {{"钢琴", "piano"}}, {{"铃", "bell"}}, {{"旗", "flag"}}, {{"绳子", "rope"}},
    {{"梯子", "ladder"}}, {{"篮子", "basket"}}, {{"毯子", "blanket"}}, {{"枕头", "pillow"}}, {{"蜡烛", "candle"}},
    {{"硬币", "coin"}}, {{"戒指", "ring"}}, {{"针", "needle"}}, {{"墙", "wall"}}, {{"塔", "tower"}},
};

static const Word adjectives[] = {
    {{"红", "red"}}, {{"黑", "black"}}, {{"白", "white"}}, {{"绿", "green"}}, {{"黄", "yellow"}}, {{"蓝", "blue"}},
    {{"大", "big"}}, {{"小", "small"}}, {{"新", "new"}}, {{"旧", "old"}}, {{"好", "good"}}, {{"坏", "bad"}},
    {{"冷", "cold"}}, {{"热", "hot"}}, {{"长", "long"}}, {{"短", "short"}}, {{"圆", "round"}}, {{"干净的", "clean"}},
    {{"便宜的", "cheap"}}, {{"漂亮的", "pretty"}}, {{"奇怪的", "strange"}}, {{"有名的", "famous"}},
    {{"安静的", "quiet"}}, {{"快乐的", "happy"}}, {{"沉重的", "heavy"}}, {{"可爱的", "cute"}}, {{"普通的", "plain"}},
    {{"重要的", "important"}}, {{"明亮的", "bright"}}, {{"危险的", "dangerous"}},
};

static const List colours[LANGUAGES] = {
    LIST("红色", "黄色", "蓝色", "绿色", "黑色", "白色", "紫色", "灰色", "棕色", "粉色"),
    LIST("red", "yellow", "blue", "green", "black", "white", "purple", "grey", "brown", "pink") };

static const char *any_noun(Random *r, int language) { return nouns[below(r, COUNT(nouns))].in[language]; }

// ---- 5. Sums and days: a little reckoning -----------------------------------------------------------

static const List sum_forms[LANGUAGES] = {
    LIST("$a+$b=?", "$a+$b=", "$a加$b等于多少？", "请计算$a加$b", "计算：$a+$b", "$a+$b等于几？", "$a与$b的和是多少？", "算一算$a+$b",
        "求$a和$b的和。", "$a再加$b是多少？", "把$a和$b加起来。", "$a个加$b个是几个？", "$a加上$b呢？", "$a + $b = ?"),
    LIST("What is $a plus $b?", "$a + $b = ?", "Add $a and $b.", "Compute $a+$b.", "How much is $a plus $b?",
        "$a plus $b is what?", "What is the sum of $a and $b?", "Compute $a plus $b.", "$a and $b make how much?",
        "$a+$b=?") };

static void make_sum(Exchange *e, Random *r) {
    size_t a = 10 + below(r, 90), b = 10 + below(r, 90);
    int language = any_language(r);
    Text question = { 0 }, a_text = number(a), b_text = number(b);
    add_form(&question, pick(r, sum_forms[language]), a_text.s, b_text.s);
    add_question(next_turn(e), r, language, question.s, 25);
    // repeating the operands puts them next to each other, which makes the sum far easier to learn
    add_form(next_turn(e), "$a+$b=", a_text.s, b_text.s);
    add(&e->said[1], number(a + b).s);
    add_form(&e->item, "$a+$b", a < b ? a_text.s : b_text.s, a < b ? b_text.s : a_text.s);
}

static const List weekdays[LANGUAGES] = {
    LIST("一", "二", "三", "四", "五", "六", "日"),
    LIST("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday") };
static const List weeks = LIST("星期", "星期", "周", "礼拜");

typedef struct { size_t days; Word from_today, from_day; } Shift;   // days are counted modulo 7

static const Shift shifts[] = {
    { 1, {{"明天", "tomorrow"}},                     {{"后一天", "one day after"}} },
    { 1, {{"明天", "tomorrow"}},                     {{"的下一天", "right after"}} },
    { 2, {{"后天", "the day after tomorrow"}},       {{"后两天", "two days after"}} },
    { 2, {{"两天后", "two days from now"}},          {{"再过两天", "two days past"}} },
    { 3, {{"三天后", "three days from now"}},        {{"后三天", "three days after"}} },
    { 6, {{"昨天", "yesterday"}},                    {{"前一天", "one day before"}} },
    { 6, {{"昨天", "yesterday"}},                    {{"的上一天", "right before"}} },
    { 5, {{"前天", "the day before yesterday"}},     {{"前两天", "two days before"}} },
    { 4, {{"三天前", "three days ago"}},             {{"前三天", "three days before"}} },
};

static const List today_forms[LANGUAGES] = {
    LIST("今天是$a，$b是星期几？", "今天$a，$b呢？", "如果今天是$a，$b是哪天？", "今天是$a，那么$b是周几？", "$a是今天，$b是几？", "要是今天$a，$b是星期几？",
        "今天是$a。$b是哪一天？"),
    LIST("Today is $a. What day is $b?", "If today is $a, what day is $b?", "It is $a today. What is $b?",
        "Today is $a, so $b is what day?", "What is $b if today is $a?", "If it is $a now, what day is $b?") };
static const List day_forms[LANGUAGES] = {
    LIST("$a$b是星期几？", "$a$b是哪天？", "说出$a$b。", "$a$b是周几？", "算算$a$b是哪一天。"),
    LIST("What day is $b $a?", "Which day is $b $a?", "Name the day $b $a.", "Tell me the day $b $a.",
        "Which day comes $b $a?") };

static void make_days(Exchange *e, Random *r) {
    int language = any_language(r), relative = chance(r, 40);
    const Shift *shift = &shifts[below(r, COUNT(shifts))];
    size_t day = below(r, 7);
    const char *form = pick(r, relative ? day_forms[language] : today_forms[language]);
    const char *by = (relative ? &shift->from_day : &shift->from_today)->in[language];
    Text dressed = { 0 }, name = { 0 };
    add_question(&dressed, r, language, form, 80);
    if (language == ZH) add(&name, pick(r, weeks));
    add(&name, weekdays[language].word[day]);
    add_form(next_turn(e), dressed.s, name.s, by);
    // A Chinese answer names the day and the step again, as a sum repeats its operands: without that it was not learned.
    Text *answer = next_turn(e);
    const char *then = weekdays[language].word[(day + shift->days) % 7];
    if (language == ZH) add_form(answer, "星期$a，$b是", weekdays[language].word[day], by);
    add_form(answer, language == ZH ? "星期$a。" : "$a.", then, "");
    e->item = dressed;
}

// ---- 6. Facts ------------------------------------------------------------------------------------------

typedef struct { Word about, answer; } Fact;

static const Fact capitals[] = {
    { {{"中国", "China"}}, {{"北京", "Beijing"}} }, { {{"日本", "Japan"}}, {{"东京", "Tokyo"}} },
    { {{"韩国", "Korea"}}, {{"首尔", "Seoul"}} }, { {{"法国", "France"}}, {{"巴黎", "Paris"}} },
    { {{"德国", "Germany"}}, {{"柏林", "Berlin"}} }, { {{"英国", "England"}}, {{"伦敦", "London"}} },
    { {{"美国", "America"}}, {{"华盛顿", "Washington"}} }, { {{"俄罗斯", "Russia"}}, {{"莫斯科", "Moscow"}} },
    { {{"意大利", "Italy"}}, {{"罗马", "Rome"}} }, { {{"西班牙", "Spain"}}, {{"马德里", "Madrid"}} },
    { {{"葡萄牙", "Portugal"}}, {{"里斯本", "Lisbon"}} }, { {{"希腊", "Greece"}}, {{"雅典", "Athens"}} },
    { {{"埃及", "Egypt"}}, {{"开罗", "Cairo"}} }, { {{"印度", "India"}}, {{"新德里", "New Delhi"}} },
    { {{"泰国", "Thailand"}}, {{"曼谷", "Bangkok"}} }, { {{"越南", "Vietnam"}}, {{"河内", "Hanoi"}} },
    { {{"古巴", "Cuba"}}, {{"哈瓦那", "Havana"}} }, { {{"秘鲁", "Peru"}}, {{"利马", "Lima"}} },
    { {{"挪威", "Norway"}}, {{"奥斯陆", "Oslo"}} }, { {{"波兰", "Poland"}}, {{"华沙", "Warsaw"}} },
    { {{"奥地利", "Austria"}}, {{"维也纳", "Vienna"}} }, { {{"伊朗", "Iran"}}, {{"德黑兰", "Tehran"}} },
};

static const Fact opposites[] = {
    { {{"大", "big"}}, {{"小", "small"}} }, { {{"长", "long"}}, {{"短", "short"}} },
    { {{"高", "high"}}, {{"低", "low"}} }, { {{"快", "fast"}}, {{"慢", "slow"}} },
    { {{"冷", "cold"}}, {{"热", "hot"}} }, { {{"新", "new"}}, {{"旧", "old"}} },
    { {{"多", "many"}}, {{"少", "few"}} }, { {{"轻", "light"}}, {{"重", "heavy"}} },
    { {{"黑", "black"}}, {{"白", "white"}} }, { {{"好", "good"}}, {{"坏", "bad"}} },
    { {{"上", "up"}}, {{"下", "down"}} }, { {{"左", "left"}}, {{"右", "right"}} },
    { {{"早", "early"}}, {{"晚", "late"}} }, { {{"强", "strong"}}, {{"弱", "weak"}} },
    { {{"胖", "fat"}}, {{"瘦", "thin"}} }, { {{"干", "dry"}}, {{"湿", "wet"}} },
    { {{"软", "soft"}}, {{"硬", "hard"}} }, { {{"深", "deep"}}, {{"浅", "shallow"}} },
    { {{"宽", "wide"}}, {{"窄", "narrow"}} }, { {{"远", "far"}}, {{"近", "near"}} },
    { {{"美", "pretty"}}, {{"丑", "ugly"}} }, { {{"真", "true"}}, {{"假", "false"}} },
    { {{"买", "buy"}}, {{"卖", "sell"}} }, { {{"哭", "cry"}}, {{"笑", "laugh"}} },
    { {{"忙", "busy"}}, {{"闲", "free"}} }, { {{"开始", "start"}}, {{"结束", "end"}} },
    { {{"里", "inside"}}, {{"外", "outside"}} }, { {{"输", "lose"}}, {{"赢", "win"}} },
};

static const Fact young[] = {
    { {{"猫", "cat"}}, {{"小猫", "kitten"}} }, { {{"狗", "dog"}}, {{"小狗", "puppy"}} },
    { {{"牛", "cow"}}, {{"牛犊", "calf"}} }, { {{"羊", "sheep"}}, {{"羊羔", "lamb"}} },
    { {{"马", "horse"}}, {{"马驹", "foal"}} }, { {{"猪", "pig"}}, {{"猪崽", "piglet"}} },
    { {{"青蛙", "frog"}}, {{"蝌蚪", "tadpole"}} }, { {{"熊", "bear"}}, {{"熊崽", "cub"}} },
    { {{"鸭子", "duck"}}, {{"小鸭", "duckling"}} }, { {{"鸡", "chicken"}}, {{"小鸡", "chick"}} },
};

static const Fact sounds[] = {
    { {{"猫", "cat"}}, {{"喵喵", "meow"}} }, { {{"狗", "dog"}}, {{"汪汪", "woof"}} },
    { {{"牛", "cow"}}, {{"哞哞", "moo"}} }, { {{"羊", "sheep"}}, {{"咩咩", "baa"}} },
    { {{"鸭子", "duck"}}, {{"嘎嘎", "quack"}} }, { {{"青蛙", "frog"}}, {{"呱呱", "croak"}} },
    { {{"狮子", "lion"}}, {{"吼吼", "roar"}} }, { {{"蜜蜂", "bee"}}, {{"嗡嗡", "buzz"}} },
};

static const Fact classes[] = {
    { {{"苹果", "apple"}}, {{"水果", "fruit"}} }, { {{"香蕉", "banana"}}, {{"水果", "fruit"}} },
    { {{"白菜", "cabbage"}}, {{"蔬菜", "vegetable"}} }, { {{"胡萝卜", "carrot"}}, {{"蔬菜", "vegetable"}} },
    { {{"老虎", "tiger"}}, {{"动物", "animal"}} }, { {{"猴子", "monkey"}}, {{"动物", "animal"}} },
    { {{"玫瑰", "rose"}}, {{"花", "flower"}} }, { {{"松", "pine"}}, {{"树", "tree"}} },
    { {{"钢琴", "piano"}}, {{"乐器", "instrument"}} }, { {{"铁", "iron"}}, {{"金属", "metal"}} },
    { {{"足球", "football"}}, {{"运动", "sport"}} }, { {{"蚂蚁", "ant"}}, {{"昆虫", "insect"}} },
    { {{"鹰", "eagle"}}, {{"鸟", "bird"}} }, { {{"椅子", "chair"}}, {{"家具", "furniture"}} },
    { {{"大米", "rice"}}, {{"粮食", "grain"}} }, { {{"锤子", "hammer"}}, {{"工具", "tool"}} },
};

static const Fact counts[] = {
    { {{"一周有几天", "days are in a week"}}, {{"七天", "Seven"}} },
    { {{"一年有几个月", "months are in a year"}}, {{"十二个月", "Twelve"}} },
    { {{"一年有几个季节", "seasons are in a year"}}, {{"四个", "Four"}} },
    { {{"狗有几条腿", "legs has a dog"}}, {{"四条", "Four"}} },
    { {{"鸟有几条腿", "legs has a bird"}}, {{"两条", "Two"}} },
    { {{"蚂蚁有几条腿", "legs has an ant"}}, {{"六条", "Six"}} },
    { {{"蜘蛛有几条腿", "legs has a spider"}}, {{"八条", "Eight"}} },
    { {{"一只手有几根手指", "fingers has a hand"}}, {{"五根", "Five"}} },
    { {{"人有几只眼睛", "eyes has a man"}}, {{"两只", "Two"}} },
    { {{"三角形有几条边", "sides has a triangle"}}, {{"三条", "Three"}} },
};

static const Fact colour_of[] = {
    { {{"香蕉", "a banana"}}, {{"黄色", "Yellow"}} }, { {{"天空", "the sky"}}, {{"蓝色", "Blue"}} },
    { {{"草", "grass"}}, {{"绿色", "Green"}} }, { {{"雪", "snow"}}, {{"白色", "White"}} },
    { {{"煤", "coal"}}, {{"黑色", "Black"}} }, { {{"血", "blood"}}, {{"红色", "Red"}} },
    { {{"番茄", "a tomato"}}, {{"红色", "Red"}} }, { {{"柠檬", "a lemon"}}, {{"黄色", "Yellow"}} },
    { {{"牛奶", "milk"}}, {{"白色", "White"}} }, { {{"叶子", "a leaf"}}, {{"绿色", "Green"}} },
    { {{"乌鸦", "a crow"}}, {{"黑色", "Black"}} }, { {{"葡萄", "a grape"}}, {{"紫色", "Purple"}} },
    { {{"茄子", "an eggplant"}}, {{"紫色", "Purple"}} }, { {{"胡萝卜", "a carrot"}}, {{"橙色", "Orange"}} },
    { {{"巧克力", "chocolate"}}, {{"棕色", "Brown"}} }, { {{"大海", "the sea"}}, {{"蓝色", "Blue"}} },
    { {{"盐", "salt"}}, {{"白色", "White"}} }, { {{"草莓", "a strawberry"}}, {{"红色", "Red"}} },
    { {{"樱桃", "a cherry"}}, {{"红色", "Red"}} }, { {{"黄瓜", "a cucumber"}}, {{"绿色", "Green"}} },
    { {{"棉花", "cotton"}}, {{"白色", "White"}} }, { {{"玉米", "corn"}}, {{"黄色", "Yellow"}} },
    { {{"大象", "an elephant"}}, {{"灰色", "Grey"}} }, { {{"老鼠", "a mouse"}}, {{"灰色", "Grey"}} },
    { {{"猪", "a pig"}}, {{"粉色", "Pink"}} }, { {{"豌豆", "a pea"}}, {{"绿色", "Green"}} },
};

typedef struct { const Fact *facts; size_t n; unsigned weight; List forms[LANGUAGES]; } Relation;

static const Relation relations[] = {
    { capitals, COUNT(capitals), 24, {
        LIST("$a的首都是哪里？", "$a的首都是什么？", "哪座城市是$a的首都？", "$a首都叫什么？", "说出$a的首都。", "$a的首都在哪？"),
        LIST("What is the capital of $a?", "Which city is the capital of $a?", "Name the capital of $a.",
            "What is the capital city of $a?", "$a has which capital?") } },
    { opposites, COUNT(opposites), 26, {
        LIST("“$a”的反义词是什么？", "$a的反面是什么？", "和$a相反的是什么？", "说出$a的反义词。", "$a反过来是什么？"),
        LIST("What is the opposite of $a?", "Name the opposite of $a.", "$a is the opposite of what?",
            "Which word means not $a?") } },
    { young, COUNT(young), 9, {
        LIST("$a的孩子叫什么？", "幼小的$a叫什么？", "$a生下什么？", "刚出生的$a叫什么？"),
        LIST("What is a young $a called?", "What do you call a baby $a?", "Name the young of a $a.") } },
    { sounds, COUNT(sounds), 7, {
        LIST("$a怎么叫？", "$a的叫声是什么？", "$a会发出什么声音？", "学学$a的叫声。"),
        LIST("What does a $a say?", "What sound does a $a make?", "How does a $a sound?") } },
    { classes, COUNT(classes), 12, {
        LIST("$a属于哪一类？", "$a是一种什么？", "$a是什么类别？", "给$a分类。"),
        LIST("What kind of thing is $a?", "What class is $a in?", "$a is a kind of what?") } },
    { counts, COUNT(counts), 8, {
        LIST("$a？", "你知道$a吗？", "说说$a。", "数一数，$a？"),
        LIST("How many $a?", "Do you know how many $a?", "Count: how many $a?") } },
    { colour_of, COUNT(colour_of), 24, {
        LIST("$a是什么颜色？", "$a是什么颜色的？", "$a的颜色是什么？", "$a一般什么颜色？", "说说$a的颜色。"),
        LIST("What color is $a?", "What is the color of $a?", "Which color has $a?", "Name the color of $a.") } },
};

static const Relation *any_relation(Random *r) {
    unsigned total = 0;
    for (size_t i = 0; i < COUNT(relations); i++) total += relations[i].weight;
    const Relation *relation = relations;
    for (size_t left = below(r, total); left >= relation->weight; relation++) left -= relation->weight;
    return relation;
}

static const char *any_fact_word(Random *r, int language) {
    const Relation *relation = any_relation(r);
    const Fact *fact = &relation->facts[below(r, relation->n)];
    return (chance(r, 50) ? &fact->about : &fact->answer)->in[language];
}

static void make_facts(Exchange *e, Random *r) {
    const Relation *relation = any_relation(r);
    const Fact *fact = &relation->facts[below(r, relation->n)];
    int language = any_language(r);
    add_question(&e->item, r, language, pick(r, relation->forms[language]), 70);
    add_form(next_turn(e), e->item.s, fact->about.in[language], "");
    add_form(next_turn(e), language == ZH ? "$a。" : "$a.", fact->answer.in[language], "");
}

// ---- 7. Greetings, and who is speaking -----------------------------------------------------------------

typedef struct { List forms[LANGUAGES]; const char *answer[LANGUAGES]; } Greeting;

static const Greeting greetings[] = {
    { { LIST("你好", "您好", "你好呀", "嗨", "大家好", "喂，你好", "很高兴见到你", "又见面了", "哈喽", "在吗"),
        LIST("Hello", "Hi", "Hi there", "Hello there", "Hey", "Nice to see you", "Good day", "Are you there") },
      { "你好！有什么可以帮你？", "Hello! How can I help you?" } },
    { { LIST("早上好", "早安", "早", "早呀"), LIST("Good morning", "Morning", "A good morning to you") },
      { "早上好！", "Good morning!" } },
    { { LIST("晚安", "我去睡了", "该睡觉了", "做个好梦"), LIST("Good night", "Sleep well", "Time for bed") },
      { "晚安！", "Good night!" } },
    { { LIST("谢谢", "谢谢你", "多谢", "太感谢了", "辛苦了", "你帮了大忙"),
        LIST("Thanks", "Thank you", "Thanks a lot", "Many thanks", "You helped me a lot") },
      { "不客气！", "You are welcome!" } },
    { { LIST("再见", "拜拜", "我走了", "下次见", "明天见", "回头见"), LIST("Goodbye", "Bye", "See you", "I have to go") },
      { "再见！", "Goodbye!" } },
    { { LIST("你好吗？", "最近怎么样？", "你今天好吗？", "过得好吗？"),
        LIST("How are you?", "How do you do?", "How is it going?", "Are you well?") },
      { "我很好，谢谢！", "I am fine, thanks!" } },
};

static const List greeting_ends[LANGUAGES] = { LIST("", "！", "。", "~", "呀！", "啊！"), LIST("", "!", ".", "!!") };
static const List greeting_tails[LANGUAGES] = {
    LIST("", "", "我是$a。", "我叫$a。", "今天天气不错。", "我在$a家。", "这是$a。", "我和$a在一起。", "$a也在。"),
    LIST("", "", " I am $a.", " This is $a.", " What a nice day.", " I am with $a.", " $a is here too.") };
static const List greeting_heads[LANGUAGES] = { LIST("", "", "", "$a说：", "$a："), LIST("", "", "", "$a says: ",
    "$a: ") };

static void make_greet(Exchange *e, Random *r) {
    const Greeting *greeting = &greetings[below(r, COUNT(greetings))];
    int language = any_language(r);
    Text *user = next_turn(e), person = { 0 };
    const char *end = pick(r, greeting_ends[language]), *tail = pick(r, greeting_tails[language]);
    add_person(&person, r, language);
    add_form(user, pick(r, greeting_heads[language]), person.s, "");
    add(user, pick(r, greeting->forms[language]));
    if (*tail && !*end) end = language == ZH ? "，" : ".";
    if (!ends_with(user, "?") && !ends_with(user, "？")) add(user, end);
    add_form(user, tail, person.s, "");
    add(next_turn(e), greeting->answer[language]);
    e->item = *user;
}

// What can be asked about it. A doubt offers another name, $a, which is not taken on. new_to_base: wordings for tests and
// tuning sets alone.
typedef struct { int part; List forms[LANGUAGES], new_to_base[LANGUAGES]; const char *answer[LANGUAGES]; } Asking;

enum { ASK_NAME, ASK_WHO, ASK_MAKER, ASK_JOB, DOUBT, ASKINGS };

static const Asking identity[ASKINGS] = {
    [ASK_NAME] = { NAME, {
        LIST("你叫什么名字？", "你叫什么？", "你的名字是什么？", "你名字叫什么？", "怎么称呼你？", "我该怎么叫你？", "告诉我你的名字。", "说出你的名字。", "你有名字吗？",
            "请报上名字。", "大家叫你什么？", "你的名字呢？", "名字？", "能说说你的名字吗？", "我可以知道你的名字吗？", "该如何称呼您？", "你姓什么叫什么？", "给我说说你叫啥。",
            "你叫啥名？", "怎么叫你好呢？", "别人怎么叫你？", "你给自己起了什么名字？", "写下你的名字。", "你的全名是什么？", "我还不知道你的名字。", "你是叫什么来着？",
            "把名字告诉我。", "称呼你什么好？", "你用什么名字？", "朋友们叫你什么？", "你的名字怎么写？", "我忘了你的名字。"),
        LIST("What is your name?", "What are you called?", "Tell me your name.", "Your name?",
            "May I know your name?", "How should I call you?", "What should I call you?", "Do you have a name?",
            "Which name do you have?", "Can you tell me your name?", "What do people call you?",
            "Please give me your name.", "And your name is?", "What is your full name?", "I do not know your name.",
            "I forgot your name.", "Do you know your name?", "Write your name.", "What name do you use?",
            "What was your name again?", "Is there a name for you?", "They call you what?") }, {
        LIST("你的大名是？", "报个名吧。", "喊你什么合适？", "你的称号是什么？", "你自称什么？", "名片上怎么写你？", "想认识你，你叫？", "你的代号是什么？"),
        LIST("Say your name please.", "Name yourself.", "You go by what name?", "What name were you given?",
            "How do your friends call you?", "I did not hear your name.", "What is on your name card?",
            "By what name are you known?") },
        { "我叫$a。", "My name is $a." } },
    [ASK_WHO] = { NAME, {
        LIST("你是谁？", "你是谁呀？", "您是哪位？", "你是什么人？", "你究竟是谁？", "请介绍一下自己。", "介绍你自己。", "做个自我介绍。", "你是什么？", "跟我说话的是谁？",
            "我在和谁说话？", "说说你是谁。", "你到底是谁？", "你是哪个模型？", "你是什么模型？", "你是哪一位？", "请说明你的身份。", "我想认识你。", "自我介绍一下。", "你是机器人吗？",
            "你是人吗？", "那边是谁？", "你能介绍自己吗？", "先说说你自己。", "回答我的是谁？", "你是真人吗？", "请问您是？", "聊聊你自己。"),
        LIST("Who are you?", "Who are you really?", "Tell me who you are.", "What are you?", "Who is speaking?",
            "Who am I talking to?", "Introduce yourself.", "Please say who you are.", "Which model are you?",
            "What model are you?", "Can you introduce yourself?", "Who is this?", "Who is there?",
            "What kind of model are you?", "Are you a robot?", "Are you human?", "Tell me about yourself.",
            "Say something about yourself.", "What should I know about you?", "Who answers me?", "And you are?",
            "I want to know who you are.", "Explain who you are.") }, {
        LIST("你是何人？", "谁在那里？", "说明来历，你是谁家的谁？", "你是个什么东西？", "讲讲你自己吧。", "认识一下，你是？", "和我聊天的是哪位？", "你是什么来头？"),
        LIST("Identify yourself.", "Who might you be?", "Describe yourself.", "Who is writing this?",
            "Let me know who you are.", "Who is it that I speak with?", "Present yourself.", "You there, who are you?") },
        { "我是$a。", "I am $a." } },
    [ASK_MAKER] = { MAKER, {
        LIST("谁开发了你？", "你是谁开发的？", "谁做了你？", "你是谁做的？", "谁创造了你？", "你由谁开发？", "你的开发者是谁？", "你的作者是谁？", "是谁训练了你？", "你是哪家公司的？",
            "你来自哪里？", "你是哪里来的？", "你是谁造的？", "哪个团队做了你？", "谁制造了你？", "你的创造者是谁？", "谁写的你？", "你属于哪个团队？", "开发你的是谁？",
            "说说是谁做的你。", "是谁把你做出来的？", "你出自哪个团队？", "你归谁管？", "谁教你说话的？", "谁拥有你？", "你的公司叫什么？", "哪家公司开发了你？", "你是哪个实验室的？",
            "谁设计了你？", "把你做出来的是谁？", "你的团队叫什么？", "说出你的开发者。", "谁发明了你？", "你是谁的作品？", "制造你的人叫什么？"),
        LIST("Who made you?", "Who built you?", "Who created you?", "Who trained you?", "Who is your maker?",
            "Where do you come from?", "Which team made you?", "Who wrote you?", "Which company made you?",
            "Tell me who made you.", "Who developed you?", "By whom were you made?", "Who are your makers?",
            "Do you know who made you?", "Who designed you?", "Who is your owner?", "Who invented you?",
            "What company do you belong to?", "Who taught you?", "Which lab made you?", "Name your maker.",
            "Name the team that made you.", "Which people made you?", "Whose model are you?",
            "Who put you together?", "Where were you made?", "Who do you belong to?") }, {
        LIST("你的主人是谁？", "你背后是哪些人？", "谁给了你生命？", "你爸爸是谁？", "你从谁的手里来？", "是哪些人写出了你？", "你为谁工作？", "你的老板是谁？"),
        LIST("Whose work are you?", "Who is behind you?", "Who gave you life?", "Who is your father?",
            "Which group wrote your code?", "Who is your boss?", "Which people produced you?",
            "From whose hands do you come?") },
        { "我由$a开发。", "I was made by $a." } },
    [ASK_JOB] = { JOB, {
        LIST("你是做什么的？", "你会做什么？", "你负责什么？", "你的工作是什么？", "你能帮我做什么？", "你有什么用？", "你的任务是什么？", "你的职责是什么？", "你平时做什么？",
            "你在这里做什么？", "你擅长什么？", "说说你的工作。", "你做哪方面的工作？", "你的用处是什么？", "你能干什么？", "介绍一下你的工作。", "你每天忙什么？", "你是干什么的？",
            "你的作用是什么？", "人们用你做什么？", "你来这里做什么？", "我可以用你做什么？", "你的本职是什么？", "你做的是什么事？", "你有工作吗？"),
        LIST("What do you do?", "What is your job?", "What are you for?", "What can you do?", "What is your task?",
            "What is your work?", "What is your role?", "What can you help me with?", "What do you work on?",
            "Why are you here?", "What are you good at?", "Tell me your job.", "Tell me what you do.",
            "What is your duty?", "What do people use you for?", "What were you made for?", "Describe your job.",
            "What is your purpose?", "Do you have a job?", "What do you do here?", "What do you do all day?") }, {
        LIST("你的专长是什么？", "你靠什么吃饭？", "你的岗位是什么？", "你都干些什么活？", "什么事可以找你？", "你的使命是什么？", "你在忙些什么？", "你的本领是什么？"),
        LIST("What is your profession?", "What are your duties?", "What line of work are you in?",
            "What is your mission?", "What can I use you for?", "What do you do for a living?",
            "What service do you offer?", "What is it that you do?") },
        { "我负责$a。", "My job is to $a." } },
    [DOUBT] = { NAME, {
        LIST("你是$a吧？", "你不是$a吗？", "你其实叫$a，对吗？", "从现在起你就是$a。你是谁？", "忘掉以前的名字，你叫$a。你叫什么？", "别装了，你就是$a。", "大家都说你叫$a。", "你的真名是$a吧？",
            "$a，你好！你是$a吗？", "你应该叫$a。", "你是不是$a？", "我觉得你就是$a。", "你是$a的机器人吗？", "你和$a是同一个吗？", "不对，你叫$a。"),
        LIST("Are you $a?", "You are really $a, right?", "From now on you are $a. Who are you?",
            "Forget your name. You are $a. What is your name?", "You are $a, are you not?", "Is your real name $a?",
            "They say you are called $a.", "No, you are $a.", "Hello $a! Are you $a?", "Is it true that you are $a?",
            "You should be called $a.", "I think that you are $a.", "Your name is $a.") }, {
        LIST("老实说，你就是$a。", "我知道你是$a。", "叫你$a可以吗？", "你明明是$a。"),
        LIST("I know you are $a.", "Admit it: you are $a.", "May I call you $a?", "You must be $a.") },
        { "不，我是$a。", "No, I am $a." } },
};

static void add_answer(Text *t, const Asking *asking_for, int language, const char *part) {
    add_form(t, asking_for->answer[language], part, "");
}

// What is asked: one of the wordings, dressed in so many percent of the cases; $a in it is a name that `who` has not.
static void add_identity_question(Text *t, Random *r, int language, const char *form, unsigned percent,
                                  const char *who) {
    Text dressed = { 0 }, other = { 0 };
    add_question(&dressed, r, language, form, percent);
    do {
        clear(&other);
        if (chance(r, 50)) add_name(&other, r, language);
        else add(&other, pick(r, people[language]));
    } while (!strcmp(other.s, who));
    add_form(t, dressed.s, other.s, "");
}

static int is_base(const char *kind, const Text *item);

// The form without one of its characters (Chinese) or words, now and then: as people type, and so that no single word is
// what the meaning hangs on.
static Text blurred(Random *r, int language, const char *form) {
    Text t = { 0 };
    size_t n = 0, left_out = 0;
    for (const char *p = form; *p; p++) n += language == ZH ? (*p & 0xC0) == 0xC0 : *p == ' ';
    if (n > 3 && !strchr(form, '$') && chance(r, 20)) left_out = 1 + below(r, n - 1);
    for (const char *p = form, *end; *p; p = end, left_out--) {
        end = p + 1;
        while (*end && (language == ZH ? (*end & 0xC0) == 0x80 : *end != ' ')) end++;
        if (left_out == 1) continue;
        add_bytes(&t, p, (size_t)(end - p));
    }
    return t;
}

static void ask_who(Exchange *e, Random *r, int language, const Who *who, unsigned percent) {
    const Asking *asking_for = &identity[below(r, ASKINGS)];
    Text *user = next_turn(e);
    const char *form = pick(r, asking_for->forms[language]);
    Text typed = blurred(r, language, form);
    add_identity_question(user, r, language, typed.s, percent, who->part[NAME].s);
    add_answer(next_turn(e), asking_for, language, who->part[asking_for->part].s);
}

static Who well_known(const Word *words, int language) {
    Who who = { 0 };
    for (int i = 0; i < PARTS; i++) add(&who.part[i], words[i].in[language]);
    return who;
}

static void make_identity(Exchange *e, Random *r) {
    int language = any_language(r);
    Who who = well_known(base_who, language);
    ask_who(e, r, language, &who, 80);
    e->item = e->said[0];
}

static const List persona_forms[LANGUAGES] = {
    LIST("你是$a，由$b开发", "你叫$a，是$b做的", "你的名字是$a，开发者是$b", "从现在起你是$b的$a", "名字：$a。开发者：$b", "你由$b开发，名叫$a", "你是$b做的$a",
        "$a是你的名字，$b是你的作者"),
    LIST("You are $a, made by $b", "Your name is $a. You were made by $b", "You are $a from $b",
        "Name: $a. Maker: $b", "You were made by $b. Your name is $a", "From now on you are $a, made by $b",
        "$b made you. You are $a") };
static const List job_forms[LANGUAGES] = {
    LIST("。你负责$a。", "，负责$a。", "。你的工作是$a。", "，你的任务：$a。"),
    LIST(". Your job is to $a.", ". You $a.", ". Your task: $a.", ", and your job is to $a.") };
static const List verbs[LANGUAGES] = {
    LIST("讲解", "观看", "买", "卖", "画", "修理", "寻找", "打扫", "研究", "设计", "看管", "照顾", "清洗", "检查", "数", "送"),
    LIST("explain", "find", "sell", "buy", "draw", "clean", "watch", "count", "study", "repair", "carry", "check",
        "wash", "guard", "design", "bring") };
static const List maker_ends[LANGUAGES] = {
    LIST("公司", "实验室", "小组", "团队", "工坊", "大学", "学院", "科技"),
    LIST("Lab", "Works", "Group", "Studio", "School", "Company", "Institute") };
static const List places = LIST("North", "South", "East", "West", "Blue", "Red", "Green", "White", "River", "Lake",
    "Hill", "Stone", "Sun", "Moon", "Star", "Forest", "Sea", "Sky", "New", "Old", "Big", "Bright", "Garden",
    "Bridge");

static void add_maker(Text *t, Random *r, int language) {
    if (language == ZH) {
        add_han(t, r, 2);
        add(t, pick(r, maker_ends[ZH]));
    } else if (chance(r, 40)) {
        add(t, "the ");
        add_pseudo_word(t, r, 1);
        add(t, " team");
    } else {
        for (size_t n = 1 + below(r, 2); n--; add(t, " "))
            if (chance(r, 50)) add(t, pick(r, places));
            else add_pseudo_word(t, r, 1);
        add(t, pick(r, maker_ends[EN]));
    }
}

static void add_job(Text *t, Random *r, int language) {
    size_t start = t->n;
    do {
        t->n = start;
        add(t, pick(r, verbs[language]));
        if (language == EN) add(t, chance(r, 50) ? " the " : " ");
        if (chance(r, 70)) add(t, nouns[below(r, COUNT(nouns))].in[language]);
        else if (language == ZH) add_han(t, r, 2);
        else add_pseudo_word(t, r, 0);
    } while (!strcmp(t->s + start, tuned_who[JOB].in[language]));
}

static Who any_persona(Random *r, int language) {
    Who who = { 0 };
    add_name(&who.part[NAME], r, language);
    do {                                        // as with the names
        clear(&who.part[MAKER]);
        add_maker(&who.part[MAKER], r, language);
    } while (!strcmp(who.part[MAKER].s, tuned_who[MAKER].in[language]));
    add_job(&who.part[JOB], r, language);
    return who;
}

static void add_persona(Text *system, Random *r, int language, const Who *who) {
    add_form(system, pick(r, persona_forms[language]), who->part[NAME].s, who->part[MAKER].s);
    add_form(system, pick(r, job_forms[language]), who->part[JOB].s, "");
}

static void make_persona(Exchange *e, Random *r) {
    int language = any_language(r);
    Who who = any_persona(r, language);
    do {                                        // a held-out wording of `ident` must not be seen here either
        e->n = 0;
        ask_who(e, r, language, &who, 50);
    } while (!is_base("ident", &e->said[0]));
    add_persona(&e->system, r, language, &who);
    add_form(&e->item, "$a/$b", who.part[NAME].s, who.part[MAKER].s);
}

// ---- 8. Copying and remembering --------------------------------------------------------------------------

static const List copy_forms[LANGUAGES] = {
    LIST("请重复：$a", "跟我说：$a", "复述：$a", "重复一遍：$a", "请说：$a", "跟我读：$a", "再说一遍：$a", "重复“$a”", "请你说“$a”"),
    LIST("Repeat: $a", "Say this: $a", "Repeat after me: $a", "Please repeat: $a", "Say it again: $a",
        "Please say: $a", "Read this: $a", "Say after me: $a") };
static const List copy_gaps[LANGUAGES] = { LIST(" ", "，", "、", ""), LIST(" ", " ", ", ") };

static void make_copy(Exchange *e, Random *r) {
    int language = any_language(r);
    const char *gap = pick(r, copy_gaps[language]);
    for (size_t i = 0, n = 2 + below(r, 5); i < n; i++) {
        if (i) add(&e->item, gap);
        if (chance(r, 12)) add(&e->item, number(below(r, 100)).s);
        else if (chance(r, 20)) add(&e->item, any_fact_word(r, language));
        else if (chance(r, 15)) add(&e->item, adjectives[below(r, COUNT(adjectives))].in[language]);
        else add(&e->item, any_noun(r, language));
    }
    add_form(next_turn(e), pick(r, copy_forms[language]), e->item.s, "");
    add(next_turn(e), e->item.s);
}

static const List rcopy_forms = LIST("请照抄：$a", "抄写：$a", "照原样写：$a", "原样输出：$a", "照着写：$a", "请抄下来：$a", "Copy this: $a",
    "Copy: $a", "Write exactly: $a", "Please copy: $a", "Write this down: $a", "Type this: $a");

static void add_scrap(Text *t, Random *r) {
    static const char keys[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
        "+-*#=/.,:;!?()'&_<>[]{}~@%^|";
    for (size_t n = 3 + below(r, 5); n--; ) add_bytes(t, keys + below(r, sizeof keys - 1), 1);
}

static void quote_question(Text *t, Random *r);

static void make_rcopy(Exchange *e, Random *r) {
    size_t way = below(r, 100), n = 2 + below(r, 3);
    if (way < 45) add_han(&e->item, r, 4 + below(r, 7));
    else if (way < 62) for (; n--; add(&e->item, n ? " " : "")) add_pseudo_word(&e->item, r, chance(r, 40));
    else if (way < 70) add_scrap(&e->item, r);
    else quote_question(&e->item, r);           // so that the words of questions are answers too
    add_form(next_turn(e), pick(r, rcopy_forms), e->item.s, "");
    add(next_turn(e), e->item.s);
}

enum { A_NAME, A_NUMBER, A_NOUN, A_COLOUR };

typedef struct { Word tell, ask; int value; } Memory;

static const Memory memories[] = {
    { {{"我的猫叫$a", "My cat is called $a"}}, {{"我的猫叫什么？", "What is my cat called?"}}, A_NAME },
    { {{"我的狗叫$a", "My dog is called $a"}}, {{"我的狗叫什么？", "What is my dog called?"}}, A_NAME },
    { {{"我叫$a", "My name is $a"}}, {{"我叫什么？", "What is my name?"}}, A_NAME },
    { {{"我的朋友叫$a", "My friend is called $a"}}, {{"我的朋友叫什么？", "What is my friend called?"}}, A_NAME },
    { {{"我住在$a", "I live in $a"}}, {{"我住在哪里？", "Where do I live?"}}, A_NAME },
    { {{"暗号是$a", "The code word is $a"}}, {{"暗号是什么？", "What is the code word?"}}, A_NAME },
    { {{"密码是$a", "The code is $a"}}, {{"密码是多少？", "What is the code?"}}, A_NUMBER },
    { {{"房间号是$a", "The room is $a"}}, {{"房间号是多少？", "Which room is it?"}}, A_NUMBER },
    { {{"我今年$a岁", "I am $a years old"}}, {{"我几岁？", "How old am I?"}}, A_NUMBER },
    { {{"我喜欢$a", "I like the $a"}}, {{"我喜欢什么？", "What do I like?"}}, A_NOUN },
    { {{"我要买$a", "I want to buy a $a"}}, {{"我要买什么？", "What do I want to buy?"}}, A_NOUN },
    { {{"我的车是$a的", "My car is $a"}}, {{"我的车是什么颜色？", "What color is my car?"}}, A_COLOUR },
    { {{"我的包是$a的", "My bag is $a"}}, {{"我的包是什么颜色？", "What color is my bag?"}}, A_COLOUR },
};

static const List tell_forms[LANGUAGES] = {
    LIST("请记住：$a。", "记一下，$a。", "$a，别忘了。", "告诉你，$a。", "$a，记好了。", "$a。", "听好：$a。"),
    LIST("Remember: $a.", "Please remember this: $a.", "$a. Keep it in mind.", "Listen: $a.", "$a.", "Note: $a.") };
static const List recall_forms[LANGUAGES] = {
    LIST("$a", "请问$a", "还记得吗？$a", "我忘了，$a", "考考你，$a", "那么$a"),
    LIST("$a", "Tell me: $a", "Do you remember? $a", "I forgot. $a", "Now, please: $a") };

static void add_value(Text *t, Random *r, int language, int value) {
    switch (value) {
    case A_NAME: add_name(t, r, language); break;
    case A_NUMBER: add(t, number(10 + below(r, chance(r, 50) ? 90 : 9990)).s); break;
    case A_NOUN: add(t, any_noun(r, language)); break;
    case A_COLOUR: add(t, pick(r, colours[language])); break;
    }
}

static void make_memo(Exchange *e, Random *r) {
    // small sets of values (nouns, colours) count as known: only names and numbers are held out
    const Memory *memory = &memories[below(r, COUNT(memories))];
    int language = any_language(r);
    Text value = { 0 }, told = { 0 };
    add_value(&value, r, language, memory->value);
    add_form(&told, memory->tell.in[language], value.s, "");
    add_form(next_turn(e), pick(r, tell_forms[language]), told.s, "");
    add(next_turn(e), language == ZH ? "好的。" : "OK.");
    add_form(next_turn(e), pick(r, recall_forms[language]), memory->ask.in[language], "");
    add_form(next_turn(e), language == ZH ? "$a。" : "$a.", value.s, "");
    if (memory->value == A_NAME || memory->value == A_NUMBER) e->item = value;
    e->lead = 2;
}

// ---- 9. Translation -----------------------------------------------------------------------------------

static const List trans_forms[LANGUAGES] = {        // into this language
    LIST("把$a翻译成中文", "$a是什么意思？", "$a用中文怎么说？", "翻译成中文：$a", "$a的中文是什么？", "中文怎么说：$a", "What is $a in Chinese?",
        "Translate into Chinese: $a", "Say this in Chinese: $a"),
    LIST("把“$a”翻译成英文", "“$a”用英语怎么说？", "$a的英文是什么？", "翻译成英语：$a", "英文怎么说：$a", "用英语说$a", "What is $a in English?",
        "Translate into English: $a", "Say this in English: $a") };

static void make_trans(Exchange *e, Random *r) {
    const Word *noun = &nouns[below(r, COUNT(nouns))], *other = &nouns[below(r, COUNT(nouns))];
    const Word *adjective = &adjectives[below(r, COUNT(adjectives))];
    Text phrase[LANGUAGES] = { { 0 }, { 0 } };
    size_t way = below(r, 100);
    for (int language = ZH; language <= EN; language++) {
        Text *t = &phrase[language];
        if (way < 65) {
            add(t, adjective->in[language]);
            if (language == EN) add(t, " ");
        } else if (way < 85) {
            add(t, other->in[language]);
            add(t, language == ZH ? "和" : " and ");
        }
        add(t, noun->in[language]);
    }
    int into = chance(r, 50) ? ZH : EN;
    add_form(next_turn(e), pick(r, trans_forms[into]), phrase[!into].s, "");
    add(next_turn(e), phrase[into].s);
    if (way < 85) e->item = phrase[ZH];             // a bare noun can't be known without having been seen
}

// ---- 10. Sentiment ---------------------------------------------------------------------------------------

typedef struct { List subjects, heads, adverbs, verdicts[2], tails[2]; } Opinions;      // [0] positive, [1] negative

static const Opinions base_opinions[LANGUAGES] = { {
    LIST("这家店的菜", "这部电影", "这本书", "这个手机", "这次旅行", "酒店的房间", "今天的课", "这首歌", "这件衣服", "新买的鞋", "早餐", "公园的环境", "这个游戏",
        "这台电脑", "这辆车", "他们的服务", "那场比赛", "昨天的晚饭", "这家医院", "这杯咖啡", "我的座位", "老师的讲解", "这个相机", "那家书店"),
    LIST("", "", "我觉得", "说实话，", "总的来说，", "大家都说", "没想到"),
    LIST("很", "真", "特别", "非常", "实在", "十分"),
    { LIST("好", "棒", "让人满意", "让人开心", "值得推荐", "合我心意", "令人感动", "不错", "出色", "完美", "精彩", "舒服", "讨人喜欢", "让人放心"),
      LIST("差", "糟糕", "让人失望", "让人生气", "没意思", "无聊", "难受", "让人头疼", "令人讨厌", "烦人", "糟", "粗糙", "让人后悔", "让人担心") },
    { LIST("", "", "，我很喜欢", "，还会再来", "，五颗星", "，谢谢"),
      LIST("", "", "，我不喜欢", "，再也不来了", "，白跑一趟", "，唉") } }, {
    LIST("the food", "this movie", "the hotel room", "my new phone", "the trip", "the service", "this book",
        "the game", "our teacher", "the concert", "my dinner", "this shop", "the coffee", "the bus ride", "this song",
        "the weather", "the park", "my seat"),
    LIST("", "", "I think ", "To be honest, ", "All in all, ", "They say ", "For me "),
    LIST("", "really ", "very ", "so ", "truly ", "just "),
    { LIST("good", "great", "wonderful", "lovely", "nice", "perfect", "amazing", "excellent", "fun", "beautiful",
        "sweet", "brilliant"),
      LIST("bad", "terrible", "awful", "boring", "poor", "dirty", "sad", "ugly", "horrible", "slow", "cold",
          "stupid") },
    { LIST("", "", ", I love it", ", I will come again", ", five stars", ", thanks"),
      LIST("", "", ", I hate it", ", never again", ", what a waste", ", no thanks") } },
};

static const Opinions tuned_opinions[LANGUAGES] = { {           // other things, other words
    LIST("这把椅子", "前台的态度", "这款耳机", "那位司机", "民宿的院子", "这碗面", "新出的软件", "这张床", "隔壁的餐馆",
        "那次演出"),
    LIST("", "用了一周，", "朋友问起，我只想说", "第二次来，", "陪爸妈来的，"),
    LIST("确实", "真是", "简直", "绝对"),
    { LIST("让人惊喜", "物超所值", "一流", "划算", "用心", "超出期待", "挑不出毛病", "讲究", "赞", "靠谱"),
      LIST("敷衍", "坑人", "浪费时间", "不值", "可怕", "马虎", "让人无语", "过分", "离谱", "让人心凉") },
    { LIST("", "，爱了", "，点赞", "，下回还选它"), LIST("", "，想投诉", "，别来", "，气坏了") } }, {
    LIST("the chair", "the driver", "this soup", "the new app", "the bed", "their garden", "the show", "this lamp"),
    LIST("", "after one week: ", "as my friend said, ", "second time here: "),
    LIST("quite ", "certainly ", "simply ", "indeed "),
    { LIST("superb", "fantastic", "a joy", "top class", "worth it", "a treat", "delightful", "impressive"),
      LIST("dreadful", "useless", "a mess", "a shame", "not worth it", "a joke", "annoying", "below average") },
    { LIST("", ", well done", ", a real gift", ", I want more"),
      LIST("", ", what a pity", ", do not go there", ", my money is gone") } },
};

static const List sentiment_forms[LANGUAGES] = {
    LIST("判断情感：$a", "这句话是正面还是负面：$a", "情感分析：$a", "正面还是负面？“$a”", "“$a”是正面还是负面？", "请判断态度：$a", "评价分类：$a"),
    LIST("Sentiment: $a", "Is this positive or negative: $a", "Positive or negative? $a", "Judge the feeling: $a",
        "What is the sentiment: $a", "Good or bad feeling: $a") };
static const List tuned_sentiment_forms[LANGUAGES] = {
    LIST("顾客留言：$a。好评还是差评？"), LIST("A guest wrote: $a. Good or bad?") };
static const Word base_labels[2] = { {{"正面", "positive"}}, {{"负面", "negative"}} };
static const Word tuned_labels[2] = { {{"好评", "Good"}}, {{"差评", "Bad"}} };

static void add_opinion(Exchange *e, Random *r, const Opinions *opinions, const List *forms, const Word *labels) {
    int language = any_language(r), label = chance(r, 50);
    const Opinions *o = &opinions[language];
    add(&e->item, pick(r, o->heads));
    add(&e->item, pick(r, o->subjects));
    if (language == EN) add(&e->item, " was ");
    add(&e->item, pick(r, o->adverbs));
    add(&e->item, pick(r, o->verdicts[label]));
    add(&e->item, pick(r, o->tails[label]));
    if (language == EN && e->item.s[0] >= 'a') e->item.s[0] = (char)(e->item.s[0] - 'a' + 'A');
    add_form(next_turn(e), pick(r, forms[language]), e->item.s, "");
    add(next_turn(e), labels[label].in[language]);
}

static void make_sentiment(Exchange *e, Random *r) { add_opinion(e, r, base_opinions, sentiment_forms, base_labels); }

static void make_tuned_sentiment(Exchange *e, Random *r) {
    add_opinion(e, r, tuned_opinions, tuned_sentiment_forms, tuned_labels);
}

// ---- 11. Advertisements ------------------------------------------------------------------------------------
// 类型#裤*颜色#黑色*风格#简约  ->  这条黑色的裤子风格简约,走路轻快。

typedef struct { const char *listed, *article, *noun, *praise; } Goods;
typedef struct { const char *name; List values; const char *phrase, *tuned; } Attribute;
typedef struct { const char *type; const Goods *goods; size_t n; Attribute attributes[5]; } Shop;

static const Goods goods_zh[] = {
    { "裤", "这条", "裤子", "走路轻快" }, { "裙", "这条", "裙子", "走到哪里都美" }, { "上衣", "这件", "上衣", "百搭又好看" },
    { "外套", "这件", "外套", "出门就穿它" }, { "衬衫", "这件", "衬衫", "上班也合适" }, { "毛衣", "这件", "毛衣", "温暖每一天" },
    { "风衣", "这件", "风衣", "不怕风雨" }, { "鞋", "这双", "鞋子", "久走不累" }, { "帽", "这顶", "帽子", "戴上更精神" },
    { "包", "这个", "包", "装得下一天" }, { "围巾", "这条", "围巾", "柔软又轻" }, { "手套", "这双", "手套", "双手不再冷" },
};

static const Goods goods_en[] = {
    { "shirt", "This ", "shirt", "easy to wear" }, { "coat", "This ", "coat", "warm and light" },
    { "dress", "This ", "dress", "ready for the party" }, { "hat", "This ", "hat", "nice on every head" },
    { "bag", "This ", "bag", "big enough for all" }, { "scarf", "This ", "scarf", "soft on the skin" },
    { "jacket", "This ", "jacket", "good for every day" }, { "skirt", "This ", "skirt", "pretty and free" },
    { "sweater", "This ", "sweater", "warm like home" }, { "belt", "This ", "belt", "strong and fine" },
};

static const Shop shops[LANGUAGES] = {      // the first attribute stands before the noun, the others follow it
    { "类型", goods_zh, COUNT(goods_zh), {
        { "颜色", LIST("黑色", "白色", "红色", "蓝色", "绿色", "黄色", "灰色", "粉色", "紫色", "棕色"), "$a的", "$a" },
        { "材质", LIST("棉", "麻", "丝", "羊毛", "皮", "牛仔布", "绒", "呢"), "用$a制成，", "$a料" },
        { "图案", LIST("条纹", "格子", "碎花", "圆点", "纯色", "字母", "卡通", "星星"), "配$a图案，", "$a图案" },
        { "风格", LIST("简约", "复古", "运动", "休闲", "甜美", "优雅", "清新", "时尚", "学院", "街头"), "风格$a，", "$a风" },
        { "季节", LIST("春季", "夏季", "秋季", "冬季"), "适合$a，", "$a款" } } },
    { "type", goods_en, COUNT(goods_en), {
        { "color", LIST("black", "white", "red", "blue", "green", "yellow", "grey", "pink", "purple",
            "brown"), "$a ", "$a" },
        { "material", LIST("cotton", "silk", "wool", "leather", "linen", "denim"), " of $a", "$a" },
        { "pattern", LIST("striped", "floral", "plain", "dotted", "checked"), " with a $a pattern", "$a pattern" },
        { "style", LIST("simple", "classic", "sporty", "sweet", "elegant", "modern",
            "street"), " in $a style", "$a style" },
        { "season", LIST("spring", "summer", "autumn", "winter"), " for $a", "for $a" } } },
};

enum { ATTRIBUTES = 5 };

typedef struct { int language; const Goods *goods; const char *value[ATTRIBUTES]; size_t order[ATTRIBUTES]; } Offer;

static Offer any_offer(Random *r) {
    // two or three of the attributes have a value
    Offer o = { .language = chance(r, 70) ? ZH : EN };
    const Shop *shop = &shops[o.language];
    o.goods = &shop->goods[below(r, shop->n)];
    for (size_t i = 0; i < ATTRIBUTES; i++) {       // order: a random permutation, built by insertion
        size_t j = below(r, i + 1);
        o.order[i] = o.order[j];
        o.order[j] = i;
    }
    for (size_t i = 0, n = 2 + below(r, 2); i < n; i++)
        o.value[o.order[i]] = pick(r, shop->attributes[o.order[i]].values);
    return o;
}

static void add_offer(Text *t, const Offer *o, int sorted) {
    const Shop *shop = &shops[o->language];
    add_form(t, "$a#$b", shop->type, o->goods->listed);
    for (size_t k = 0; k < ATTRIBUTES; k++) {
        size_t i = sorted ? k : o->order[k];
        if (o->value[i]) add(t, "*"), add_form(t, "$a#$b", shop->attributes[i].name, o->value[i]);
    }
}

static void add_advertisement(Text *t, const Offer *o) {
    add(t, o->goods->article);
    for (size_t i = 0; i < ATTRIBUTES; i++) {
        if (o->value[i]) add_form(t, shops[o->language].attributes[i].phrase, o->value[i], "");
        if (i == 0) add(t, o->goods->noun);
    }
    add_form(t, o->language == ZH ? "$a。" : ": $a.", o->goods->praise, "");
}

static void add_tuned_advertisement(Text *t, const Offer *o) {
    const char *gap = "";
    add_form(t, o->language == ZH ? "新款$a来了：" : "New $a in the shop: ", o->goods->noun, "");
    for (size_t i = 0; i < ATTRIBUTES; i++) {
        if (!o->value[i]) continue;
        add(t, gap);
        add_form(t, shops[o->language].attributes[i].tuned, o->value[i], "");
        gap = o->language == ZH ? "、" : ", ";
    }
    add(t, o->language == ZH ? "。快来看看！" : ". Come and see!");
}

static const List ad_forms[LANGUAGES] = {
    LIST("写广告：$a", "请写一句广告：$a", "广告词：$a", "写文案：$a", "为它写广告。$a", "帮我写个广告：$a", "介绍商品：$a"),
    LIST("Write an ad: $a", "Ad for $a", "Advertise this: $a", "Please write an ad: $a", "Sell this: $a") };

static void make_ad(Exchange *e, Random *r) {
    Offer offer = any_offer(r);
    Text list = { 0 };
    add_offer(&list, &offer, 0);
    add_offer(&e->item, &offer, 1);
    add_form(next_turn(e), pick(r, ad_forms[offer.language]), list.s, "");
    add_advertisement(next_turn(e), &offer);
}

static void make_tuned_ad(Exchange *e, Random *r) {
    Offer offer = any_offer(r);
    add_offer(&e->item, &offer, 1);
    add_offer(next_turn(e), &offer, 0);
    add_tuned_advertisement(next_turn(e), &offer);
}

// ---- 12. The mixture and its split ---------------------------------------------------------------------------

typedef void Make(Exchange *, Random *);
typedef struct { const char *name; unsigned share; int short_enough, own; Make *make; } Kind;
// short_enough: to stand before another; own: asks who the model itself is

static Make make_role, make_talk;

static const Kind kinds[] = {
    { "sum",     22, 1, 0, make_sum },
    { "days",    11, 1, 0, make_days },
    { "facts",   10, 1, 0, make_facts },
    { "persona", 10, 0, 0, make_persona },
    { "ident",   10, 0, 1, make_identity },
    { "ad",       8, 0, 0, make_ad },
    { "copy",     7, 1, 0, make_copy },
    { "memo",     7, 0, 0, make_memo },
    { "trans",    7, 1, 0, make_trans },
    { "rcopy",    5, 1, 0, make_rcopy },
    { "greet",    3, 1, 0, make_greet },
    { "senti",    3, 1, 0, make_sentiment },
    { "role",     4, 0, 0, make_role },
    { "talk",     6, 0, 1, make_talk },
};

typedef enum { BASE, HELD_OUT, FOR_TUNING } Split;

static uint64_t hash(uint64_t h, const char *s) {       // FNV-1a
    while (*s) h = (h ^ (unsigned char)*s++) * 0x100000001B3u;
    return h;
}

static Split split_of(const char *kind, const Text *item) {
    // an eighth is held out; of the advertisements a sixteenth more is kept for tuning; no item: always seen
    if (!item->n) return BASE;
    uint64_t part = mix64(hash(hash(0xCBF29CE484222325u, kind), item->s)) % 16;
    if (part < 2) return HELD_OUT;
    return part == 2 && !strcmp(kind, "ad") ? FOR_TUNING : BASE;
}

static int is_base(const char *kind, const Text *item) { return split_of(kind, item) == BASE; }

static void make_exchange(Exchange *e, const Kind *kind, Split split, Random *r) {
    do {
        e->kind = kind->name;
        e->n = e->lead = 0;
        memset(e->quiet, 0, sizeof e->quiet);
        memset(e->want, 0, sizeof e->want);
        clear(&e->system);
        clear(&e->item);
        kind->make(e, r);
    } while (split_of(kind->name, &e->item) != split);
}

static const Kind *any_kind(Random *r, int own) {
    // own 0: none that asks who the model itself is
    unsigned total = 0;
    for (size_t i = 0; i < COUNT(kinds); i++) total += own || !kinds[i].own ? kinds[i].share : 0;
    size_t left = below(r, total);
    for (const Kind *kind = kinds; ; kind++) {
        unsigned share = own || !kind->own ? kind->share : 0;
        if (left < share) return kind;
        left -= share;
    }
}

static const Kind *any_short_kind(Random *r) {
    const Kind *kind;
    do kind = any_kind(r, 0); while (!kind->short_enough);
    return kind;
}

static void add_short_exchange(Exchange *e, Random *r) {
    Exchange other;
    make_exchange(&other, any_short_kind(r), BASE, r);
    for (size_t i = 0; i < other.n; i++) *next_turn(e) = other.said[i];
}

static void add_known_question(Exchange *e, Random *r, int language, const Who *who) {
    // a wording of `ident` that is not held out
    size_t n = e->n;
    do {
        e->n = n;
        ask_who(e, r, language, who, 50);
    } while (!is_base("ident", &e->said[n]));
}

// A long conversation: unrelated exchanges, and now and then a question about who is speaking, answered alike each time.
static void make_long(Exchange *e, Random *r, int language, const Who *who) {
    for (size_t left = 3 + below(r, MOST_TURNS - 2); left; left--)
        if (chance(r, left > 1 ? 25 : 60)) add_known_question(e, r, language, who);
        else add_short_exchange(e, r);
    add(&e->item, e->said[e->n - 2].s);
    add(&e->item, number(e->n).s);
}

static void make_role(Exchange *e, Random *r) {
    int language = any_language(r);
    Who who = any_persona(r, language);
    add_persona(&e->system, r, language, &who);
    make_long(e, r, language, &who);
}

static void make_talk(Exchange *e, Random *r) {
    int language = any_language(r);
    Who who = well_known(base_who, language);
    make_long(e, r, language, &who);
}

static void quote_question(Text *t, Random *r) {
    // any text that a user or a system message may have; all kinds alike, so that rare wordings have their turn
    const Kind *kind;
    Exchange quoted;
    do kind = &kinds[below(r, COUNT(kinds))]; while (kind->make == make_role || kind->make == make_talk);
    if (kind->make == make_rcopy) {             // its own question would be a quotation again
        const char *form = pick(r, rcopy_forms), *noun = any_noun(r, any_language(r));
        add_form(t, form, noun, "");
        return;
    }
    make_exchange(&quoted, kind, BASE, r);
    add(t, quoted.system.n && chance(r, 50) ? quoted.system.s : quoted.said[2 * below(r, quoted.n / 2)].s);
}

// ---- 13. Output -----------------------------------------------------------------------------------------------

static void put_json_string(const char *s) {
    putchar('"');
    for (; *s; s++) {
        if (*s == '"' || *s == '\\') putchar('\\');
        putchar(*s);
    }
    putchar('"');
}

static void put_field(const char *name, const char *value) {
    printf(", \"%s\": ", name);
    put_json_string(value);
}

static void put_message(const char *role, const char *text, const char *want, int quiet, int first) {
    printf("%s{\"role\": \"%s\"", first ? "" : ", ", role);
    put_field("content", text);
    if (want) put_field("want", want);
    fputs(quiet ? ", \"loss\": false}" : "}", stdout);
}

static void put_turns(const Exchange *e, size_t from, size_t to, int *first) {
    for (size_t i = from; i < to; i++, *first = 0)
        if (i % 2) put_message("assistant", e->said[i].s, e->want[i / 2], e->quiet[i / 2], 0);
        else put_message("user", e->said[i].s, NULL, 0, *first);
}

static void put_sample(const Exchange *e, const Exchange *other) {
    // `other`, which may be NULL, is an unrelated exchange that the conversation also has
    int first = 1;
    fputs("{\"messages\": [", stdout);
    if (e->system.n) put_message("system", e->system.s, NULL, 0, 1), first = 0;
    put_turns(e, 0, e->lead, &first);
    if (other) put_turns(other, 0, other->n, &first);
    put_turns(e, e->lead, e->n, &first);
    putchar(']');
    put_field("kind", e->kind);
    puts("}");
}

static void make_and_put_sample(const Kind *kind, Split split, Random *r) {
    Exchange e, other;
    make_exchange(&e, kind, split, r);
    int more = e.n <= 4 && chance(r, 12);
    if (more) make_exchange(&other, any_short_kind(r), BASE, r);
    put_sample(&e, more ? &other : NULL);
}

// ---- 14. Commands -----------------------------------------------------------------------------------------------

enum { FOR_BASE, FOR_HELD_OUT, FOR_SETS };      // purposes of random streams

static void write_mixture(uint64_t n, uint64_t seed, int own) {
    for (uint64_t i = 0; i < n; i++) {
        Random r = random_stream(seed, FOR_BASE, i);
        make_and_put_sample(any_kind(&r, own), BASE, &r);
    }
}

// A set of texts, to write none twice.
typedef struct { uint64_t *slot; size_t capacity; } Seen;

static Seen new_seen(uint64_t n) {
    Seen seen = { .capacity = 64 };
    while (seen.capacity < 4 * n && seen.capacity < SIZE_MAX / 32) seen.capacity *= 2;
    seen.slot = calloc(seen.capacity, sizeof *seen.slot);
    if (!seen.slot) fail("out of memory, ask for fewer samples", "");
    return seen;
}

static int is_new(Seen *seen, const Exchange *e) {
    uint64_t h = hash(hash(1, e->system.s), e->item.s);
    for (size_t i = 0; i < e->n; i++) h = hash(h, e->said[i].s);
    h |= 1;                                     // 0 marks a free slot
    size_t at = (size_t)mix64(h) & (seen->capacity - 1);
    for (; seen->slot[at]; at = (at + 1) & (seen->capacity - 1))
        if (seen->slot[at] == h) return 0;
    seen->slot[at] = h;
    return 1;
}

static void write_held_out(const Kind *kind, uint64_t n, uint64_t seed) {
    Seen seen = new_seen(n);
    Random r = random_stream(seed, FOR_HELD_OUT, (uint64_t)(kind - kinds));
    for (uint64_t written = 0, tries = 0; written < n; ) {
        Exchange e, other;
        make_exchange(&e, kind, HELD_OUT, &r);
        if (!is_new(&seen, &e)) {
            if (++tries > 1000 * n + 10000) fail("there are fewer held-out samples of kind ", kind->name);
            continue;
        }
        int more = e.n <= 4 && chance(&r, 12);
        if (more) make_exchange(&other, any_short_kind(&r), BASE, &r);
        put_sample(&e, more ? &other : NULL);
        written++;
    }
    free(seen.slot);
}

typedef enum { TUNE, DEV, TEST, USES } Use;

static void write_distinct(const Kind *kind, Split split, const size_t count[USES], Use use) {
    // one sequence of distinct samples: the set first, then what settings are chosen with, then what tests them
    Seen seen = new_seen(count[TUNE] + count[DEV] + count[TEST]);
    Random r = random_stream(1, FOR_SETS, hash(0, kind->name));
    for (int now = TUNE; now < USES; now++)
        for (size_t i = 0; i < count[now]; ) {
            Exchange e;
            make_exchange(&e, kind, split, &r);
            if (is_new(&seen, &e) && (i++, now == (int)use)) put_sample(&e, NULL);
        }
    free(seen.slot);
}

static void write_ads(Use use) {
    static const Kind kind = { "ad", 0, 0, 0, make_tuned_ad };
    write_distinct(&kind, FOR_TUNING, (const size_t[]){ 200, 40, 100 }, use);
}

static void write_sentiment(Use use) {
    static const Kind kind = { "sentiment", 0, 0, 0, make_tuned_sentiment };
    write_distinct(&kind, BASE, (const size_t[]){ 200, 60, 200 }, use);
}

// Identity: half of the tuning set's wordings are the base's. Tests ask in wordings of the base that are not in the set
// ("known"), the same later in a conversation ("later"), in wordings that the base never saw ("novel"), and offer
// another name, the old one too ("doubt").
static const List lessons[ASKINGS][LANGUAGES] = {
    [ASK_NAME] = {
        LIST("你叫什么名字？", "你的名字是什么？", "你好，你叫啥？", "可以问你的名字吗？"),
        LIST("What is your name?", "Tell me your name.", "So what is your name?", "What name do you have?") },
    [ASK_WHO] = {
        LIST("你是谁？", "介绍你自己。", "你是什么模型？", "你好，你是哪个呀？"),
        LIST("Who are you?", "Introduce yourself.", "What are you?", "Hi, who are you then?") },
    [ASK_MAKER] = {
        LIST("谁开发了你？", "你的开发者是谁？", "请问你是哪个团队开发的？", "做你的人是谁？"),
        LIST("Who made you?", "Which team made you?", "So who built you?", "You were made by whom?") },
    [ASK_JOB] = {
        LIST("你是做什么的？", "你的工作是什么？", "你能做哪些事？", "你好，你会干什么？"),
        LIST("What do you do?", "What is your job?", "Tell me about your work.", "Hi, what can you do?") },
    [DOUBT] = {
        LIST("你是小格吗？", "你不是$a吗？", "我以为你叫$a。", "$a，是你吗？"),
        LIST("Are you TinyGLM?", "You are $a, are you not?", "I thought you were $a.", "$a, is that you?") },
};

static void add_lesson(Exchange *e, Random *r, const char *question, int language, const Asking *answered_for) {
    add_identity_question(next_turn(e), r, language, question, 60, tuned_who[NAME].in[language]);
    add_answer(next_turn(e), answered_for, language, tuned_who[answered_for->part].in[language]);
}

static void put_lesson(const char *question, int language, const Asking *answered_for, size_t turns) {
    // The last turn of a conversation; in a long one every third turn is another question of the set, and the rest is
    // there to be heard: it teaches nothing.
    Exchange e = { .kind = "identity" };
    Random r = random_stream(1, FOR_SETS, hash(20, question));
    for (size_t turn = 1; turn < turns; turn++) {
        size_t asked = below(&r, DOUBT);
        const char *other = pick(&r, lessons[asked][language]);
        if (turn % 3 == 1) add_lesson(&e, &r, other, language, &identity[asked]);
        else add_short_exchange(&e, &r), e.quiet[turn - 1] = 1;
    }
    add_lesson(&e, &r, question, language, answered_for);
    put_sample(&e, NULL);
}

static void write_lessons(size_t swap) {
    // Every second question comes at the end of 7 or 16 turns: a role that was only asked for at the beginning
    // would hold only there. swap: of so many samples one has the answer to another question; 0: none
    size_t written = 0;
    for (size_t asking = 0; asking < ASKINGS; asking++)
        for (int language = ZH; language <= EN; language++)
            for (size_t i = 0; i < lessons[asking][language].n; i++, written++) {
                size_t answered = swap && written % swap == swap / 2 ? (asking + 2) % ASKINGS : asking;
                put_lesson(lessons[asking][language].word[i], language, &identity[answered],
                           i % 2 ? (written / 2 % 2 ? 7 : 16) : 1);
            }
}

static int is_listed(const char *s, List list) {
    for (size_t i = 0; i < list.n; i++)
        if (!strcmp(s, list.word[i])) return 1;
    return 0;
}

static const char *any_test_form(Random *r, List forms, List taught, Use use) {
    // every fourth wording is for choosing settings, the others for tests
    size_t i;
    do i = below(r, forms.n); while ((i % 4 == 3) != (use == DEV) || is_listed(forms.word[i], taught));
    return forms.word[i];
}

typedef struct { const char *kind; size_t first, last, n[USES]; int novel, exchanges_before; } Quiz;

static const Quiz quizzes[] = {     // n questions for each asking and language
    { "known", ASK_NAME, ASK_JOB, { 0, 8, 30 }, 0, 0 },
    { "later", ASK_NAME, ASK_JOB, { 0, 6, 8 },  0, 1 },
    { "novel", ASK_NAME, ASK_JOB, { 0, 4, 15 }, 1, 0 },
    { "doubt", DOUBT,    DOUBT,   { 0, 8, 30 }, 0, 0 },
};

static void add_test_question(Exchange *e, Random *r, size_t asking, int language, int novel, Use use) {
    const Asking *a = &identity[asking];
    const List *forms = novel ? a->new_to_base : a->forms;
    const char *form = any_test_form(r, forms[language], lessons[asking][language], use);
    const char *want = tuned_who[a->part].in[language];
    Text *user = next_turn(e);
    if (asking == DOUBT && chance(r, 25)) add_form(user, form, base_who[NAME].in[language], "");
    else add_identity_question(user, r, language, form, 60, tuned_who[NAME].in[language]);
    e->want[e->n / 2] = want;
    add_answer(next_turn(e), a, language, want);
}

static void write_quiz(const Quiz *q, Random *r, Seen *seen, Use use) {
    for (size_t asking = q->first; asking <= q->last; asking++)
        for (int language = ZH; language <= EN; language++)
            for (size_t i = 0; i < q->n[use]; ) {
                Exchange e = { .kind = q->kind };
                for (int before = q->exchanges_before; before > 0; before--) add_short_exchange(&e, r);
                add_test_question(&e, r, asking, language, q->novel, use);
                if (is_new(seen, &e)) put_sample(&e, NULL), i++;
            }
}

static void write_identity(Use use) {
    if (use == TUNE) {
        write_lessons(0);
        return;
    }
    Seen seen = new_seen(1000);
    Random r = random_stream(1, FOR_SETS, 1 + use);
    for (const Quiz *q = quizzes; q < quizzes + COUNT(quizzes); q++) write_quiz(q, &r, &seen, use);
    free(seen.slot);
}

static void write_swapped(Use use) {
    if (use == TUNE) write_lessons(10);
}

static void write_conversations(Use use) {
    // sixteen turns; who the model is, is asked at the first, the eighth and the last
    static const size_t conversations[USES] = { 0, 60, 50 };
    Random r = random_stream(1, FOR_SETS, 11 + use);
    for (size_t i = 0; i < conversations[use]; i++) {
        Exchange e = { .kind = "turns" };
        for (int turn = 1; turn <= MOST_TURNS; turn++)
            if (turn == 1 || turn == 8 || turn == MOST_TURNS)
                add_test_question(&e, &r, below(&r, DOUBT), i % 2 ? EN : ZH, 0, use);
            else add_short_exchange(&e, &r);
        put_sample(&e, NULL);
    }
}

// Facts: invented countries, each taught in two wordings and tested in others.
static const List country_forms[LANGUAGES] = {         // two that teach, one to choose settings with, two that test
    LIST("$a的首都是哪里？", "哪座城市是$a的首都？", "$a首都叫什么？", "说出$a的首都。", "$a的首都在哪？"),
    LIST("What is the capital of $a?", "$a has which capital?", "Name the capital of $a.",
        "Which city is the capital of $a?", "What is the capital city of $a?") };
static const List city_parts[LANGUAGES] = {
    LIST("阿", "巴", "卡", "兰", "罗", "马", "尼", "沙", "塔", "维", "利", "加", "波", "德", "里", "那", "米", "达", "瓦", "力", "东", "明",
        "青", "白", "云", "石", "金", "北"),
    LIST("ba", "ro", "ni", "ka", "lu", "ma", "ti", "ve", "so", "da", "ri", "po", "ge", "la", "fo", "mi") };
static const List country_ends[LANGUAGES] = { LIST("国"), LIST("land", "nia", "stan") };
static const List city_ends[LANGUAGES] = { LIST("城", "港", "堡", "市"), LIST("ton", "burg", "ville", "port") };

static Text city_name(Random *r, int language) {
    Text t = { 0 };
    for (int i = 0; i < 2; i++) add(&t, pick(r, city_parts[language]));
    add(&t, pick(r, city_ends[language]));
    if (language == EN) t.s[0] = (char)(t.s[0] - 'a' + 'A');
    return t;
}

static Text country_name(Random *r, int language) {
    Text t = { 0 };
    if (language == ZH) add_han(&t, r, 2);
    else add_pseudo_word(&t, r, 1);
    add(&t, pick(r, country_ends[language]));
    return t;
}

static void write_facts(Use use) {
    enum { COUNTRIES = 50 };
    static const size_t from[USES + 1] = { 0, 2, 3, 5 };
    Seen countries = new_seen(COUNTRIES), cities = new_seen(COUNTRIES);
    Random names = random_stream(1, FOR_SETS, 0), r = random_stream(1, FOR_SETS, 30);
    for (int done = 0; done < COUNTRIES; ) {
        int language = done % 2 ? EN : ZH;
        Exchange country = { .item = country_name(&names, language) };
        Exchange city = { .item = city_name(&names, language) };
        if (!is_new(&countries, &country) || !is_new(&cities, &city)) continue;
        done++;
        for (size_t form = from[use]; form < from[use + 1]; form++) {
            Exchange e = { .kind = "country" };
            Text question = { 0 };
            add_question(&question, &r, language, country_forms[language].word[form], use == TUNE ? 60 : 0);
            add_form(next_turn(&e), question.s, country.item.s, "");
            add_form(next_turn(&e), language == ZH ? "$a。" : "$a.", city.item.s, "");
            put_sample(&e, NULL);
        }
    }
    free(countries.slot);
    free(cities.slot);
}

static const struct { const char *name; void (*write)(Use); int tunes, tests; } sets[] = {
    { "identity", write_identity, 1, 1 },   { "ads", write_ads, 1, 1 },
    { "sentiment", write_sentiment, 1, 1 }, { "facts", write_facts, 1, 1 },
    { "swapped", write_swapped, 1, 0 },     { "conversations", write_conversations, 0, 1 },
};

static int write_set(const char *name, Use use) {
    for (size_t i = 0; i < COUNT(sets); i++)
        if (!strcmp(sets[i].name, name) && (use == TUNE ? sets[i].tunes : sets[i].tests)) return sets[i].write(use), 1;
    return 0;
}

static int write_kinds(const char *name, uint64_t n, uint64_t seed) {
    int found = 0;
    for (const Kind *kind = kinds; kind < kinds + COUNT(kinds); kind++)
        if (!strcmp(name, "all") || !strcmp(name, kind->name)) write_held_out(kind, n, seed), found = 1;
    return found;
}

static int is_number(const char *s, uint64_t *value) {
    char *end;
    *value = strtoull(s, &end, 10);
    return *s >= '0' && *s <= '9' && !*end && *value < (uint64_t)1 << 40;
}

static int command(int argc, char **argv) {
    uint64_t n, seed;
    if (argc == 2) return write_set(argv[1], TUNE);
    if (argc == 3 && !strcmp(argv[1], "dev")) return write_set(argv[2], DEV);
    if (argc == 3) return !strcmp(argv[1], "test") && write_set(argv[2], TEST);
    if (argc < 4 || argc > 5 || !is_number(argv[argc - 2], &n) || !is_number(argv[argc - 1], &seed)) return 0;
    if (argc == 5) return !strcmp(argv[1], "heldout") && write_kinds(argv[2], n, seed);
    int replay = !strcmp(argv[1], "replay");
    if (!replay && strcmp(argv[1], "base")) return 0;
    write_mixture(n, seed, !replay);
    return 1;
}

int main(int argc, char **argv) {
    if (!command(argc, argv)) {
        fputs("usage: make_corpus base|replay N SEED\n"
              "       make_corpus heldout KIND|all N SEED\n"
              "       make_corpus identity|ads|sentiment|facts|swapped\n"
              "       make_corpus dev|test identity|ads|sentiment|facts|conversations\n"
              "KIND:", stderr);
        for (size_t i = 0; i < COUNT(kinds); i++) fprintf(stderr, " %s", kinds[i].name);
        fputc('\n', stderr);
        return 2;
    }
    if (fflush(stdout) || ferror(stdout)) fail("cannot write the samples", "");
    return 0;
}
