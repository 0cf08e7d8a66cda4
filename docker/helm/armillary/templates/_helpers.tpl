{{/* Names. Short enough for the longest suffix: the name of a StatefulSet is part of a label. */}}
{{- define "armillary.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- define "armillary.fullname" -}}
{{- $name := include "armillary.name" . -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else if contains $name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* Labels that never change, since selectors cannot: (dict "root" $ "component" "control"). */}}
{{- define "armillary.selectorLabels" -}}
app.kubernetes.io/name: {{ include "armillary.name" .root }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{- define "armillary.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{ include "armillary.selectorLabels" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/part-of: armillary
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
{{- end -}}

{{- define "armillary.image" -}}
{{- $image := .Values.image -}}
{{- if $image.digest -}}
{{ $image.repository }}@{{ $image.digest }}
{{- else -}}
{{ $image.repository }}:{{ $image.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end -}}

{{/* The service account of a component: (dict "root" $ "component" "control" "values" .Values.control). */}}
{{- define "armillary.serviceAccountName" -}}
{{- if .values.serviceAccount.name -}}
{{- .values.serviceAccount.name -}}
{{- else if .values.serviceAccount.create -}}
{{- printf "%s-%s" (include "armillary.fullname" .root) .component -}}
{{- else -}}
default
{{- end -}}
{{- end -}}

{{/* A value of `config` as one types it in the environment. JSON writes 1000000, and not 1e+06. */}}
{{- define "armillary.text" -}}
{{- if kindIs "string" . -}}
{{- . -}}
{{- else -}}
{{- toJson . -}}
{{- end -}}
{{- end -}}

{{- define "armillary.options" -}}
{{- $parts := list -}}
{{- range $name, $value := . -}}
{{- $parts = append $parts (printf "%s=%s" $name (include "armillary.text" $value)) -}}
{{- end -}}
{{- join "," $parts -}}
{{- end -}}

{{/* What values cannot say together, and the schema cannot see. */}}
{{- define "armillary.check" -}}
{{- if eq .Values.launcher "kubernetes" -}}
{{- if .Values.autoscaling.enabled -}}
{{- fail "launcher: kubernetes and autoscaling.enabled would both scale the spheres: choose one" -}}
{{- end -}}
{{- if .Values.zones -}}
{{- fail "launcher: kubernetes scales one Deployment, and zones make one for each zone: choose one" -}}
{{- end -}}
{{- end -}}
{{- if and .Values.autoscaling.enabled (gt (int .Values.autoscaling.minReplicas) (int .Values.autoscaling.maxReplicas)) -}}
{{- fail (printf "autoscaling.minReplicas (%d) is above autoscaling.maxReplicas (%d)" (int .Values.autoscaling.minReplicas) (int .Values.autoscaling.maxReplicas)) -}}
{{- end -}}
{{- if and (hasKey .Values.config "epochs") (hasKey .Values.config "steps") -}}
{{- fail "config: give either epochs or steps, not both" -}}
{{- end -}}
{{- end -}}

{{/* What Pods of both kinds have in common: (dict "root" $ "component" "control" "values" .Values.control). */}}
{{- define "armillary.podMetadata" -}}
{{- if or .values.podAnnotations .root.Values.taskFiles -}}
annotations:
  {{- with .root.Values.taskFiles }}
  # other files are other Pods
  checksum/task: {{ toJson . | sha256sum }}
  {{- end }}
  {{- with .values.podAnnotations }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{ end -}}
labels:
  {{- include "armillary.selectorLabels" . | nindent 2 }}
  app.kubernetes.io/part-of: armillary
  {{- with .values.podLabels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end -}}

{{- define "armillary.podSettings" -}}
serviceAccountName: {{ include "armillary.serviceAccountName" . }}
# the variables that Kubernetes makes of services are not needed, and many
enableServiceLinks: false
terminationGracePeriodSeconds: {{ .values.terminationGracePeriodSeconds }}
{{- with .root.Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .root.Values.podSecurityContext }}
securityContext:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.topologySpreadConstraints }}
topologySpreadConstraints:
  {{- range . }}
  {{- $selector := dict "matchLabels" (include "armillary.selectorLabels" $ | fromYaml) }}
  - {{- merge (deepCopy .) (dict "labelSelector" $selector) | toYaml | nindent 4 }}
  {{- end }}
{{- end }}
{{- end -}}

{{- define "armillary.containerSettings" -}}
image: {{ include "armillary.image" .root }}
imagePullPolicy: {{ .root.Values.image.pullPolicy }}
{{- with .root.Values.securityContext }}
securityContext:
  {{- toYaml . | nindent 2 }}
{{- end }}
resources:
  {{- toYaml .values.resources | nindent 2 }}
ports:
  - name: grpc
    containerPort: {{ .port }}
# It has not listened yet: liveness is asked only after that.
startupProbe:
  grpc:
    port: {{ .port }}
    service: ""
  periodSeconds: 2
  timeoutSeconds: 2
  failureThreshold: {{ max 1 (div (int .values.startupSeconds) 2) }}
# Alive is who answers. Whoever has lost its parent is alive: it looks for another, and must not be killed for that.
livenessProbe:
  grpc:
    port: {{ .port }}
    service: ""
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
# Ready: control when the run has opened, a sphere while its link to a parent is up.
readinessProbe:
  grpc:
    port: {{ .port }}
    service: ready
  periodSeconds: 5
  timeoutSeconds: 3
  failureThreshold: 2
{{- end -}}

{{- define "armillary.commonEnv" -}}
- name: ARMILLARY_LOG_FORMAT
  value: {{ .root.Values.logFormat }}
{{- if .root.Values.taskFiles }}
- name: PYTHONPATH
  value: /task
{{- end }}
{{- with .values.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "armillary.commonMounts" -}}
# the root file system is read-only
- name: tmp
  mountPath: /tmp
{{- if .root.Values.taskFiles }}
- name: task
  mountPath: /task
  readOnly: true
{{- end }}
{{- with .values.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "armillary.commonVolumes" -}}
- name: tmp
  emptyDir: {}
{{- if .root.Values.taskFiles }}
- name: task
  configMap:
    name: {{ include "armillary.fullname" .root }}-task
{{- end }}
{{- with .values.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "armillary.claim" -}}
accessModes:
  {{- toYaml .Values.checkpoints.accessModes | nindent 2 }}
{{- with .Values.checkpoints.storageClass }}
storageClassName: {{ . }}
{{- end }}
resources:
  requests:
    storage: {{ .Values.checkpoints.size }}
{{- end -}}
