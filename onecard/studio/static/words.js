// The page's words in English and Chinese. messages.js has those of the server.

const WORDS = {
  runs: ["Runs", "训练"], prepare: ["Prepare", "准备"], chat: ["Compare and chat", "对比与对话"], export: ["Export", "导出"],
  theme: ["Theme", "主题"], light: ["Light", "浅色"], dark: ["Dark", "深色"], auto: ["Automatic", "自动"],
  language: ["Language", "语言"], skip: ["Skip to the content", "跳到内容"],
  lost: ["The server does not answer. Runs go on.", "服务器无响应。训练仍在继续。"],
  noRuns: ["No run under", "此目录下没有训练："], startOne: ["Prepare one", "去准备一个"],
  isCut: ["Too many folders under the root: some were not searched.", "目录过多，部分未搜索。"],
  show: ["Show", "显示"], run: ["Run", "训练"], state: ["State", "状态"], step: ["Step", "步"], loss: ["Loss", "损失"],
  speed: ["Tokens/s", "词元/秒"], memory: ["Memory", "内存"], actions: ["Actions", "操作"],
  starting: ["starting", "启动中"], running: ["running", "运行中"], stopping: ["stopping", "停止中"], finished: ["finished", "已完成"],
  stopped: ["stopped", "已停止"], failed: ["failed", "失败"], killed: ["killed", "被终止"], unknown: ["unknown", "未知"],
  stop: ["Stop", "停止"], resume: ["Resume", "继续"], report: ["Report", "报告"], log: ["Log", "日志"], close: ["Close", "关闭"],
  lossTitle: ["Loss", "损失"], raw: ["a step", "每步"], smoothed: ["smoothed", "平滑"], validation: ["validation", "验证"],
  learning_rate: ["Learning rate", "学习率"], grad_norm: ["Gradient norm", "梯度范数"],
  supervised_tokens_per_second: ["Supervised tokens a second", "每秒监督词元"],
  memory_bytes: ["Memory beside the process", "进程以外的内存"], planned: ["plan", "计划"], page_hit_rate: ["Pages there in time", "页命中率"],
  steps: ["Steps", "步数"], first: ["from", "从"], last: ["to", "到"], all: ["All steps", "全部"],
  rawShown: ["Show the loss of each step", "显示每步损失"],
  differences: ["Settings that differ", "不同的设置"], setting: ["Setting", "设置"], noDifference: ["The settings are the same.", "设置相同。"],
  settings: ["Settings", "设置"], plan: ["Memory plan", "内存计划"], selectOne: ["Select a run to see its curves.", "选择一个训练以查看曲线。"],
  model: ["Model folder", "模型目录"], data: ["Data files, one a line", "数据文件，每行一个"], dataTitle: ["Data", "数据"], evalData: ["Validation data", "验证数据"],
  output: ["Output folder", "输出目录"], browse: ["Browse", "浏览"], choose: ["Choose", "选择"], up: ["Up", "上级"], folderCut: ["Not all entries are shown.", "未显示全部条目。"],
  r: ["Rank", "秩"], length: ["Length, tokens", "长度（词元）"], batch: ["Rows a micro-batch", "微批行数"], accumulation: ["Micro-batches an update", "每次更新的微批数"],
  recompute: ["Recompute activations", "重算激活"], planDecides: ["the plan decides", "由计划决定"], yes: ["yes", "是"], no: ["no", "否"],
  paging: ["Base in memory, GiB (0: the plan decides)", "基座内存 GiB（0：由计划决定）"], device: ["Memory of the device, GiB", "设备内存 GiB"],
  optimizer: ["Optimizer", "优化器"], rate: ["Learning rate", "学习率"], epochs: ["Epochs", "轮数"], maxSteps: ["Updates at most", "最多更新数"],
  more: ["More settings, as YAML", "更多设置（YAML）"], inputs: ["Model and data", "模型与数据"], training: ["Training", "训练"],
  preview: ["Preview the data", "预览数据"], previewing: ["Reading and tokenizing …", "读取并分词中…"], learned: ["learned", "学习"], masked: ["masked", "屏蔽"],
  format: ["format", "格式"], columns: ["columns", "列"], supervised: ["share supervised", "监督占比"], truncated: ["share truncated", "截断占比"],
  packed: ["packed rows", "打包行数"], full: ["full", "满"], tokensMore: ["tokens more", "个词元未显示"], badRows: ["Rows that were skipped", "跳过的行"],
  fits: ["fits", "放得下"], doesNotFit: ["does not fit", "放不下"], of: ["of", "/"], total: ["total", "合计"], planIn: ["plan in", "计划用时"],
  largest: ["Largest context and micro-batch that fit", "可放下的最大长度与微批"], tokens: ["tokens", "词元"], rows: ["rows", "行"],
  change: ["To make it fit, any one of", "以下任一项可使其放下"], times: ["times the time", "倍时间"], assumed: ["As `onecard plan`: each row is full.", "与 `onecard plan` 相同：假定每行填满。"],
  command: ["Command line", "命令行"], yaml: ["YAML for --config", "--config 的 YAML"], copy: ["Copy", "复制"], copied: ["Copied", "已复制"],
  onlyYaml: ["These settings need a file: see the YAML.", "这些设置需要文件：见 YAML。"], start: ["Start the run", "开始训练"],
  must: ["must hold", "要求"], found: ["found", "发现"], doThis: ["do", "处理"],
  tunedRun: ["Run with an adapter", "带适配器的训练"], own: ["other folders", "其他目录"], adapters: ["Adapter folders, one a line", "适配器目录，每行一个"],
  load: ["Load", "加载"], loading: ["Loading …", "加载中…"], loaded: ["Loaded", "已加载"], ask: ["Models that answer", "回答的模型"], system: ["System prompt", "系统提示"],
  prompt: ["Message", "消息"], send: ["Send", "发送"], temperature: ["Temperature", "温度"], topP: ["Top p", "Top p"], maxTokens: ["Tokens at most", "最多词元"],
  seed: ["Seed", "种子"], sampling: ["Sampling", "采样"], edit: ["Edit and send again", "编辑并重发"], clear: ["Clear", "清空"], saveTalk: ["Save as JSONL", "保存为 JSONL"],
  answerTokens: ["Answer. Arrow keys choose a token.", "回答。用方向键选择词元。"],
  tokensHint: ["Point at a word of an answer, or choose it with the arrow keys: its probability and the likeliest tokens in its place are shown.", "将指针移到回答的词上，或用方向键选择，可看到其概率和此处最可能的词元。"],
  noModel: ["Load a model to talk with it.", "加载模型后即可对话。"], you: ["You", "你"],
  target: ["Write", "写出"], merge: ["Merged checkpoint, 16-bit", "合并的 16 位检查点"], gguf: ["GGUF for llama.cpp, Ollama", "GGUF（llama.cpp、Ollama）"], gptq: ["GPTQ", "GPTQ"], awq: ["AWQ", "AWQ"],
  w4a16: ["W4A16 of compressed-tensors", "compressed-tensors 的 W4A16"], fp8: ["FP8 of compressed-tensors", "compressed-tensors 的 FP8"], nvfp4: ["NVFP4 of compressed-tensors", "compressed-tensors 的 NVFP4"], mlx: ["MLX in 4 bits", "MLX 4 位"],
  adapter: ["Adapter folder", "适配器目录"], outtype: ["How matrices are stored", "矩阵存储类型"], verify: ["Data to verify on, one a line", "验证用数据，每行一个"],
  calibrate: ["Data to calibrate on, one a line", "校准用数据，每行一个"], write: ["Start the export", "开始导出"], exports: ["Exports", "导出任务"], written: ["written", "已写"],
  name: ["Name", "名称"], size: ["Size", "大小"], formula: ["Formula", "公式"], shown: ["shown", "显示"], none: ["none", "无"],
};

let at = localStorage.getItem("language") === "zh" || (!localStorage.getItem("language") && navigator.language.startsWith("zh")) ? 1 : 0;
document.documentElement.lang = at ? "zh-CN" : "en";

export const language = () => (at ? "zh" : "en");
export const t = (key) => (WORDS[key] ? WORDS[key][at] : key);
export function setLanguage(name) {
  at = name === "zh" ? 1 : 0;
  localStorage.setItem("language", name);
  document.documentElement.lang = at ? "zh-CN" : "en";
}
